"""DPO, IPO and SimPO: values and gradients of the papers' formulas, pair by pair; and of a whole step from rows."""

import math

import pytest
import torch

from gspo.algorithm.objective import Counts, Groups, as_trained, evaluate, learns_from_rows
from gspo.algorithm.pairs import forks, preferences
from gspo.algorithm.self_play_models import SelfPlayModels
from gspo.algorithm.update import Updater, make_optimizer
from gspo.config import Objective
from gspo.data.stored_rows import stored_groups
from gspo.distributed.world import World
from gspo.read_config import load_config
from gspo.types import Prompt, StoredResponses
from train import gather_experience

G, L, BETA, GAMMA = 5, 6, 0.3, 0.7
WORLD = World(0, 1, torch.device("cpu"), None)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def oracle(policy, reference, lengths, kind, smooth):
    """(loss, dloss / dlogp of chosen, ... of rejected) of one pair by its sums of log-probs [2]."""
    if kind == "ipo":
        h = policy[0] - reference[0] - policy[1] + reference[1]
        slope = 2 * (h - 1 / (2 * BETA))
        return (h - 1 / (2 * BETA)) ** 2, slope, -slope
    scale = (1.0, 1.0)
    if kind == "simpo":
        scale = tuple(1 / n for n in lengths)
        x = BETA * (policy[0] / lengths[0] - policy[1] / lengths[1]) - GAMMA
    else:
        x = BETA * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
    loss = -(1 - smooth) * math.log(sigmoid(x)) - smooth * math.log(sigmoid(-x))
    slope = BETA * (smooth * sigmoid(x) - (1 - smooth) * sigmoid(-x))
    return loss, slope * scale[0], -slope * scale[1]


def batch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, L + 1, (G, 2), generator=generator)
    mask = torch.arange(L) < lengths[..., None]
    tokens = torch.randint(3, 7, (G, 2, L), generator=generator)
    policy, reference = (-3 * torch.rand(G, 2, L, generator=generator, dtype=torch.float64) * mask for _ in range(2))
    rewards = torch.tensor([[1.0, 0.0]]).repeat(G, 1)
    return policy, Groups(reference, rewards, preferences(rewards, 0.1), forks(tokens, lengths), lengths)


@pytest.mark.parametrize("smooth", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "simpo"])
def test_values_and_gradients_are_the_papers(kind, smooth):
    policy, groups = batch()
    cfg = Objective(
        algorithm="dpo", dpo_loss=kind, label_smoothing=smooth, preference_beta=BETA, simpo_gamma=GAMMA, after_fork=0.3
    )
    found = evaluate(policy, groups, cfg, Counts(G, 1.0))
    total = 0.0
    for g in range(G):
        sums = [x[g].sum(-1).tolist() for x in (policy, groups.anchors)]
        loss, *slopes = oracle(*sums, groups.lengths[g].tolist(), kind, 0.0 if kind == "ipo" else smooth)
        total += loss / G
        for i, slope in enumerate(slopes):
            expected = torch.full((L,), slope / G, dtype=torch.float64)
            torch.testing.assert_close(found.coefficients[g, i], expected, rtol=1e-12, atol=1e-15)
    assert float(found.terms["preference"]) == pytest.approx(total, rel=1e-12)


def test_a_group_of_several_counts_as_the_mean_over_its_pairs():
    """Rewards 1, 0.5, 0.5: two pairs of three."""
    policy, groups = -torch.rand(1, 3, L, dtype=torch.float64), None
    rewards, lengths = torch.tensor([[1.0, 0.5, 0.5]]), torch.full((1, 3), L)
    nothing, apart = torch.zeros(1, 3, L), torch.zeros(1, 3, 3, dtype=torch.long)
    groups = Groups(nothing, rewards, preferences(rewards, 0.1), apart, lengths)
    sums = (BETA * policy.sum(-1))[0].tolist()
    expected = sum(-math.log(sigmoid(sums[0] - sums[i])) for i in (1, 2)) / 2
    terms = evaluate(policy, groups, Objective(algorithm="dpo", preference_beta=BETA), Counts(1, 2.0)).terms
    assert float(terms["preference"]) == pytest.approx(expected, rel=1e-12)


def test_stored_responses_are_trained_on_at_temperature_1_and_without_a_kl_term():
    cfg = load_config(None, ["objective.algorithm=dpo", "rollout.temperature=0.7", "objective.kl_coef=0.1"])
    assert learns_from_rows(cfg) and not learns_from_rows(load_config(None, ["objective.algorithm=gspo"]))
    assert learns_from_rows(load_config(None, ["objective.algorithm=gspo", "rollout.source=rows"]))
    trained = as_trained(cfg)
    assert (trained.rollout.temperature, trained.objective.kl_coef) == (1.0, 0.0)
    assert (cfg.rollout.temperature, cfg.objective.kl_coef) == (0.7, 0.1)


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Three stored pairs, embedded prompts."""
    texts = [("x = 12 - 5 = 7", "x = 17"), ("x = 3", "x = 12 / 3 = 4\nx = 4"), ("x = 1", "x = 2")]
    prompts = [
        Prompt(
            i,
            tuple(tokenizer(f"x + {i}")["input_ids"]),
            "",
            None,
            "",
            stored=StoredResponses(pair, (1.0, 0.0), (True,) * 2),
        )
        for i, pair in enumerate(texts)
    ]
    return prompts


@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_a_step_from_rows_has_the_gradient_of_dpo_written_with_a_plain_model(tokenizer, rows, micro_batch):
    """From rows to the gradient, whatever the micro-batches: one response a forward, two, or all."""
    settings = [f"optim.micro_batch_responses={micro_batch}"] if micro_batch else []
    cfg = load_config("configs/dpo.yaml", ["optim.grad_clip=1e9", *settings])
    models = SelfPlayModels(as_trained(cfg), WORLD)
    with torch.no_grad():  # away from the reference
        for p in models.policy.parameters():
            p.mul_(1.02)
    places, rollout, scores = stored_groups(rows, [0, 1, 2], tokenizer, tokenizer.eos_token_id, WORLD.device)
    experience = gather_experience(rollout, places, scores, models, 3, cfg, WORLD)
    optimizer, found = make_optimizer(models.policy, cfg), {}
    optimizer.step = lambda: found.update({name: p.grad.clone() for name, p in models.policy.named_parameters()})
    Updater(models.policy, models.head, optimizer, as_trained(cfg), WORLD).run(experience, lr=0.0)

    def logp(model, prompt, text):
        ids = [*prompt.ids, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt.ids) - 1 : -1].double()
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids[len(prompt.ids) :])[:, None]).sum()

    models.policy.zero_grad()
    loss = 0.0
    for prompt in rows:
        chosen, rejected = (
            logp(models.policy, prompt, text) - logp(models.frozen["initial"], prompt, text).detach()
            for text in prompt.stored.texts
        )
        loss = loss - torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)) / 3
    loss.backward()
    for name, p in models.policy.named_parameters():
        scale = p.grad.abs().max()
        assert scale > 0 and (found[name] - p.grad).abs().max() <= 2e-5 * scale, name

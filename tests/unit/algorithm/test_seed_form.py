"""`objective.form: seed` is the original description's loss, -E[log sigma(beta (log pi(y_w) - log pi(y_l)))], E over
all pairs of the batch: written down plainly here, in float64."""

import pytest
import torch
from architectures import tiny_model

from gspo.algorithm.objective import Counts, Groups, evaluate
from gspo.algorithm.pairs import forks, preferences
from gspo.algorithm.update import Updater
from gspo.distributed.world import World
from gspo.packing.probe_head import measure_head
from gspo.read_config import load_config
from gspo.types import Experience, Prompt, Rollout

G, N, L, MARGIN = 4, 5, 7, 0.1
PLAIN = ("objective.use_ranking_loss=false", "objective.kl_coef=0", "objective.preference_beta=0.3")


def literal_loss(answers, rewards, beta):
    """-E[log sigma(beta (log pi(y_w) - log pi(y_l)))] for log pi(y | x) and rewards [G, N], pair by pair."""
    losses = []
    for logp, r in zip(answers, rewards.tolist(), strict=True):
        for w in range(N):
            for k in range(N):
                if r[w] - r[k] > MARGIN + 1e-6:
                    losses.append(-torch.log(torch.sigmoid(beta * (logp[w] - logp[k]))))
    return torch.stack(losses).mean()


def a_rollout():
    """Four groups whose answers share their beginnings; in the second all rewards are equal: it has no pair."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, L + 1, (G, N), generator=g)
    lengths[:, 0] = L
    tokens = torch.randint(2, 97, (G, N, L), generator=g)
    tokens[:, 1:3, :2] = tokens[:, :1, :2]
    tokens[torch.arange(L) >= lengths[..., None]] = 0
    prompts = [Prompt(i, tuple(range(4, 4 + size)), "", "", "") for i, size in enumerate((5, 2, 8, 3))]
    rewards = torch.tensor([0.0, 0.1, 0.5, 0.6, 1.0], dtype=torch.float64)[torch.randint(5, (G, N), generator=g)]
    rewards[1] = 0.5
    nothing = torch.zeros(G, N, L, dtype=torch.float64)
    rollout = Rollout(prompts, tokens, lengths, nothing, nothing, lengths < L, [[""] * N] * G)
    beats = preferences(rewards, MARGIN)
    return rollout, Groups(nothing, rewards, beats, forks(tokens, lengths), lengths)


def part_of(groups, rows):
    return Groups(**{name: value[rows] for name, value in vars(groups).items() if value is not None})


@pytest.mark.parametrize("cut", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[1], [3, 0], [2]]], ids=str)
def test_loss_and_gradient_are_the_literal_formulas(cut):
    """Also in micro-batches, of which one has no pair."""
    rollout, groups = a_rollout()
    logprobs = -2 * torch.rand(G, N, L, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logprobs[:, 1:3, :2] = logprobs[:, :1, :2]  # tokens that are alike have equal log-probs
    logprobs *= rollout.mask
    cfg = load_config("seed", PLAIN).objective
    leaf = logprobs.clone().requires_grad_()
    exact = literal_loss(leaf.sum(-1), groups.rewards, cfg.preference_beta)
    slope = torch.autograd.grad(exact, leaf)[0]

    counts = Counts(G, int(groups.beats.sum()) / G)
    found = [evaluate(logprobs[rows], part_of(groups, rows), cfg, counts) for rows in cut]
    assert [*found[0].terms] == ["preference"]
    loss = sum(float(part.terms["preference"]) for part in found)
    assert loss == pytest.approx(float(exact.detach()), rel=0, abs=1e-12)
    # What two responses share cancels in a pair: coefficients are compared where a response is alone, and elsewhere
    # summed over those that share the token, which has one log-prob.
    coefs = torch.zeros_like(logprobs)
    for rows, part in zip(cut, found, strict=True):
        coefs[rows] = part.coefficients
    shared = torch.zeros(G, N, L, dtype=torch.bool)
    shared[:, :3, :2] = True
    real = rollout.mask & ~shared
    torch.testing.assert_close(coefs[real], slope[real], rtol=0, atol=1e-12)
    torch.testing.assert_close(coefs[:, :3, :2].sum(1), slope[:, :3, :2].sum(1), rtol=0, atol=1e-12)


def test_a_batch_without_a_pair_has_no_loss_and_no_gradient():
    _, groups = a_rollout()
    groups = part_of(groups, [1])
    found = evaluate(
        torch.zeros(1, N, L, dtype=torch.float64), groups, load_config("seed", PLAIN).objective, Counts(1, 0)
    )
    assert float(found.terms["preference"]) == 0 and not found.coefficients.any()


@pytest.mark.parametrize("other", [[], ["objective.form=default", "objective.after_fork=0.3"]], ids=["seed", "another"])
def test_through_a_model_the_step_is_the_literal_formulas_gradient(other):
    """Packed sequences, micro-batches of one group or all, against one padded forward a response; another setting makes
    another gradient."""
    model = tiny_model("gpt_neox").double()  # whose norms are not rounded to float32
    rollout, groups = a_rollout()
    exp = Experience(rollout, groups, rollout.logprobs, [*range(G)], G, int(groups.beats.sum()))
    loss = literal_loss(whole_answers(model, rollout), groups.rewards, 0.3)
    exact = torch.autograd.grad(loss, [*model.parameters()])
    scale = max(float(x.abs().max()) for x in exact)
    for cut in ("optim.micro_batch_tokens=10000", "optim.micro_batch_tokens=43"):
        cfg = load_config("seed", [*PLAIN, cut, "optim.grad_clip=1e9", *other])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        seen = keep_gradients(optimizer, model)
        update = Updater(model, measure_head(model), optimizer, cfg, World(0, 1, torch.device("cpu"), None)).run(
            exp, 0.0
        )
        worst = max(float((a - b).abs().max()) for a, b in zip(seen, exact, strict=True))
        near = worst < 1e-12 * max(1.0, scale) and abs(update.terms["preference"] - float(loss.detach())) < 1e-12
        assert near == (not other), (worst, scale, update.terms, loss)


def whole_answers(model, rollout, temperature=0.9):
    """log pi(y | x) [G, N] at the sampling temperature."""
    out = []
    for prompt, answers, lengths in zip(rollout.prompts, rollout.tokens, rollout.lengths, strict=True):
        for answer, n in zip(answers, lengths, strict=True):
            ids = torch.tensor([[*prompt.ids, *answer[:n].tolist()]])
            logits = model(input_ids=ids).logits[0, len(prompt.ids) - 1 : -1] / temperature
            out.append(logits.log_softmax(-1).gather(-1, answer[:n, None]).sum())
    return torch.stack(out).view(G, N)


def keep_gradients(optimizer, model):
    """Return a list that holds the gradients of the next step."""
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in model.parameters()))
    return seen

"""Gradients: equal to a plain loop over single sequences, whatever the micro-batches, the path or the mini-batches."""

import copy
from dataclasses import replace

import pytest
import torch
from architectures import tiny_model

from gspo.algorithm.objective import Counts, gspo, kl_loss
from gspo.algorithm.pairs import forks, preferences
from gspo.algorithm.update import Updater, learning_rate, make_optimizer
from gspo.distributed.world import World
from gspo.packing.probe_head import measure_head
from gspo.read_config import load_config
from gspo.types import Experience, Groups, Prompt, Rollout

G, N, L = 3, 4, 7
ALONE = World(0, 1, torch.device("cpu"), None)


def experience(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    prompts = [Prompt(i, tuple(range(4, 4 + size)), "", "", "") for i, size in enumerate((5, 2, 8))]
    lengths = torch.randint(1, L + 1, (G, N), generator=g)
    lengths[0, :2] = L
    tokens = torch.randint(2, 97, (G, N, L), generator=g)
    tokens[0, 1, :2] = tokens[0, 0, :2]  # alike at first
    tokens[torch.arange(L) >= lengths[..., None]] = 0
    rewards = torch.tensor([[1.0, 0.5, 0.1, 0.0], [0.1, 0.1, 0.1, 0.1], [0.0, 1.0, 0.0, 1.0]])
    beats = preferences(rewards, 0.1)
    exact = torch.stack([torch.stack([single(model, p, t[:n]) for t, n in zip(ts, ns, strict=True)])
                         for p, ts, ns in zip(prompts, tokens, lengths, strict=True)]).detach()  # fmt: skip
    noise = torch.randn(G, N, L, generator=g) * (torch.arange(L) < lengths[..., None])
    anchors = exact + torch.randn(G, N, L, generator=g) * (torch.arange(L) < lengths[..., None])
    apart = forks(tokens, lengths)
    rollout = Rollout(prompts, tokens, lengths, exact, torch.zeros_like(exact), lengths < L, [[""] * N] * G)
    groups = Groups(anchors, rewards, beats, apart, lengths)
    return Experience(rollout, groups, exact + 0.3 * noise, [0, 1, 2], G, int(beats.sum()))


def with_rewards(exp, rewards):
    """The same experience, the responses scored anew."""
    beats = preferences(rewards, 0.1)
    groups = replace(exp.groups, rewards=rewards, beats=beats)
    return replace(exp, groups=groups, batch_pairs=int(beats.sum()))


def single(model, prompt, tokens, temperature=0.9):
    """[L] log-probs of one unpadded sequence, zeros behind it."""
    ids = torch.tensor([[*prompt.ids, *tokens.tolist()]])
    logits = model(input_ids=ids).logits[0, len(prompt.ids) - 1 : -1] / temperature
    logp = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return torch.cat([logp, logp.new_zeros(L - len(logp))])


def plain_gradient(model, exp, cfg):
    """The whole loss over the whole batch, sequence by sequence, one backward."""
    model.zero_grad()
    r = exp.rollout
    logp = torch.stack([torch.stack([single(model, p, t[:n]) for t, n in zip(ts, ns, strict=True)])
                        for p, ts, ns in zip(r.prompts, r.tokens, r.lengths, strict=True)])  # fmt: skip
    counts, o = Counts(G, exp.batch_pairs / G), cfg.objective
    groups = replace(exp.groups, anchors=logp.detach()) if o.anchor == "old" else exp.groups
    terms = gspo(logp.double(), groups, o, counts)
    loss = sum(terms.values()) + o.kl_coef * kl_loss(logp, exp.reference_logprobs, r.mask, N, counts)
    loss.backward()
    gradient = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return gradient, float(loss)


class Recorder:
    """An optimizer that keeps the gradients it was given and moves nothing."""

    def __init__(self, model):
        self.param_groups, self.parameters, self.seen = [{}], list(model.parameters()), []

    def zero_grad(self, set_to_none=True):
        for p in self.parameters:
            p.grad = None

    def step(self):
        self.seen.append([p.grad.clone() for p in self.parameters])


def run(model, exp, *overrides):
    cfg = load_config(
        None, ["optim.grad_clip=1e9", "objective.kl_coef=0.05", "objective.preference_beta=0.5", *overrides]
    )
    recorder = Recorder(model)
    update = Updater(model, measure_head(model), recorder, cfg, ALONE).run(exp, lr=0.0)
    return recorder.seen, update, cfg


def assert_same(mine, expected, rtol=2e-4):
    for a, b in zip(mine, expected, strict=True):
        assert (a - b).abs().max() <= rtol * b.abs().max() + 1e-8


@pytest.mark.parametrize("anchor", ["none", "opponent", "old"])
@pytest.mark.parametrize("budget", [10_000, 60, 45, 1])
def test_every_micro_batch_budget_gives_the_plain_gradient(anchor, budget):
    """10,000 and 60: whole groups, live loss; 45 and 1: groups do not fit, frozen coefficients."""
    model = tiny_model("llama")
    exp = experience(model)
    seen, update, cfg = run(model, exp, f"optim.micro_batch_tokens={budget}", f"objective.anchor={anchor}")
    expected, loss = plain_gradient(model, exp, cfg)
    assert len(seen) == 1
    assert_same(seen[0], expected)
    assert sum(update.terms.values()) == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(update.logprobs, exp.rollout.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "setting",
    [
        "objective.normalizer=batch",
        "objective.length_norm=mean",
        "objective.nll_coef=0.3",
        "objective.pair_weight=gap",
        "objective.pair_weight=branch",
        "objective.after_fork=0.5",
    ],
)
def test_each_variant_gives_the_plain_gradient_on_both_paths(setting):
    model = tiny_model("qwen2")
    exp = experience(model)
    expected = plain_gradient(model, exp, run(model, exp, setting)[2])[0]
    assert_same(run(model, exp, setting)[0][0], expected)
    assert_same(run(model, exp, setting, "optim.micro_batch_responses=3")[0][0], expected)


def test_mini_batches_partition_the_gradient():
    """With weights that stand still, each mini-batch's gradient is its groups' own, normalised by their number."""
    model = tiny_model("llama")
    exp = experience(model)
    rewards = exp.groups.rewards.clone()
    rewards[1, 0] = 1.0  # every group has a pair
    exp = with_rewards(exp, rewards)
    whole = run(model, exp)[0][0]
    parts = run(model, exp, "optim.minibatches=3")[0]
    assert len(parts) == 3
    assert_same([sum(gs) / 3 for gs in zip(*parts, strict=True)], whole)
    assert len(run(model, exp, "optim.minibatches=3", "optim.epochs_per_rollout=2")[0]) == 6
    assert len(run(model, exp, "optim.minibatches=5")[0]) == 3, "no empty step"


def test_checkpointed_activations_change_no_gradient():
    from gspo.models.loading import checkpoint_activations

    model = tiny_model("llama")
    exp = experience(model)
    expected = run(model, exp)[0][0]
    checkpoint_activations(model)
    assert_same(run(model, exp)[0][0], expected, rtol=1e-6)


def test_a_small_step_raises_winners_over_losers():
    model = tiny_model("llama")
    exp = experience(model)
    cfg = load_config(None, ["objective.kl_coef=0", "objective.after_fork=1", "optim.learning_rate=1e-5"])
    moved = copy.deepcopy(model)
    Updater(moved, measure_head(moved), make_optimizer(moved, cfg), cfg, ALONE).run(exp, lr=1e-5)
    winner, loser = (2, 1), (2, 0)

    def gap(m):
        r = exp.rollout
        a, b = (single(m, r.prompts[g], r.tokens[g, i, : r.lengths[g, i]]).sum().item() for g, i in (winner, loser))
        return a - b

    assert gap(moved) > gap(model)


def test_a_gradient_that_is_not_finite_is_skipped():
    model = tiny_model("llama")
    exp = experience(model)
    cfg = load_config(None)
    exp.groups.anchors[0, 0] = float("nan")
    before = [p.clone() for p in model.parameters()]
    update = Updater(model, measure_head(model), make_optimizer(model, cfg), cfg, ALONE).run(exp, lr=1e-2)
    assert update.skipped == 1 and update.not_finite == "the anchor's log-probs"
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("path", ["live", "frozen"])
def test_what_was_not_finite_first_is_named(path):
    """Faults put into one stage after another: what comes before it is finite."""

    def named(model, exp):
        cfg = load_config(None, ["optim.micro_batch_responses=3"] if path == "frozen" else [])
        return Updater(model, measure_head(model), make_optimizer(model, cfg), cfg, ALONE).run(exp, lr=1e-2).not_finite

    model = tiny_model("llama")
    exp = experience(model)
    assert named(model, exp) == ""
    bad = replace(exp, reference_logprobs=exp.reference_logprobs.clone().fill_(-torch.inf))
    assert named(model, bad) == "the reference's log-probs"
    bad = replace(exp, groups=replace(exp.groups, rewards=exp.groups.rewards * torch.nan))
    if path == "live":
        cfg = load_config(None, ["objective.pair_weight=gap"])
        update = Updater(model, measure_head(model), make_optimizer(model, cfg), cfg, ALONE).run(bad, lr=1e-2)
        assert update.not_finite == "the loss's slope at finite log-probs"
    down = model.model.layers[1].mlp.down_proj.weight
    down.register_hook(lambda grad: grad * torch.nan)
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * torch.inf)
    assert named(model, exp) == "the gradient of model.layers.1.mlp.down_proj.weight, at a finite loss"
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    assert named(model, exp) == "the policy's log-probs"


@pytest.mark.parametrize("path", ["live", "frozen"])
@pytest.mark.parametrize("algorithm", ["gspo", "rloo", "grpo", "dr_grpo", "maxrl", "tempo", "online_dpo"])
def test_where_all_answers_are_equal_no_step_is_taken(path, algorithm):
    """The KL term has a gradient, and AdamW would make full steps of it."""
    model = tiny_model("llama")
    exp = experience(model)
    alike = torch.full((G, N), 0.5)
    exp = with_rewards(exp, alike)
    cut = ["optim.micro_batch_responses=3"] if path == "frozen" else []
    seen, update, _ = run(model, exp, f"objective.algorithm={algorithm}", *cut)
    assert seen == [] and (update.empty, update.skipped) == (1, 0) and update.grad_norms[0] > 0
    one_pair = alike.clone()
    one_pair[2, 1] = 1.0
    exp = with_rewards(exp, one_pair)
    seen, update, _ = run(model, exp, f"objective.algorithm={algorithm}", *cut)
    assert len(seen) == 1 and update.empty == 0


def test_learning_rate_by_hand():
    linear = load_config(
        None, ["learning_rate=1", "optim.warmup_steps=2", "optim.schedule=linear", "optim.min_lr_ratio=0.2"]
    )
    assert [round(learning_rate(s, 7, linear), 6) for s in range(7)] == [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    cosine = load_config(None, ["learning_rate=1", "optim.schedule=cosine"])
    assert [round(learning_rate(s, 3, cosine), 6) for s in range(3)] == [1.0, 0.5, 0.0]
    assert learning_rate(99, 100, load_config(None, ["learning_rate=0.3"])) == 0.3


def test_weight_decay_spares_norms():
    model = tiny_model("llama")
    groups = make_optimizer(model, load_config(None, ["optim.weight_decay=0.1"])).param_groups
    assert {g["weight_decay"]: {p.ndim for p in g["params"]} for g in groups} == {0.1: {2}, 0.0: {1}}

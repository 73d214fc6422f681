"""The pairs of held-out prompts: a half when a round begins, then by hand; their own pairs for each algorithm."""

from itertools import product

import pytest
import torch

from gspo.algorithm.gold_solutions import add_solutions
from gspo.algorithm.held_out_pairs import HeldOutPairs
from gspo.algorithm.self_play_models import SelfPlayModels
from gspo.distributed.world import World
from gspo.read_config import load_config
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import Sampler
from gspo.types import Prompt

WORLD = World(0, 1, torch.device("cpu"), None)
REWARDS = torch.tensor([[1.0, 0.5, 0.0, 0.5], [1.0, 0.0, 1.0, 0.05], [0.0, 0.0, 0.0, 0.0]])
TEXTS = ("Solve 3x = 9.", "Solve x - 4 = 5.", "Solve 2x + 1 = 7.")


@pytest.fixture(scope="module")
def sampled(tokenizer):
    """-> prompts, and a function from settings to (models, rollout, what is kept)."""
    prompts = [
        Prompt(i, tuple(tokenizer(t)["input_ids"]), t, "", "", {"solution": f"x = {i}"}) for i, t in enumerate(TEXTS)
    ]

    def keep(*overrides):
        models = SelfPlayModels(load_config("configs/quick.yaml", ["model.precision=fp32", *overrides]), WORLD)
        sampler = Sampler(models.sampler, tokenizer, WORLD.device)
        rollout = sampler.generate(prompts, 4, Sampling(3.0, max_new_tokens=8))
        if "objective.algorithm=spin" in overrides:
            rollout = add_solutions(rollout, tokenizer, sampler.end_id, models.policy.config, WORLD)
        return models, rollout, HeldOutPairs.keep(prompts, [0, 1, 2], rollout, REWARDS, models)

    return prompts, keep


def move(policy):
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn_like(p))


def gap(l, tokens, lengths, g, i, j, after):  # noqa: E741
    """The lead of response i over j: tokens from the fork on, those behind it weighted."""
    a, b = (tokens[g, k, : lengths[g, k]].tolist() for k in (i, j))
    fork = next((t for t, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    of = lambda k, n: sum(float(l[g, k, t]) * (1 if t == fork else after) for t in range(fork, n))  # noqa: E731
    return of(i, len(a)) - of(j, len(b))


def in_order(gaps):
    """The share above 0; a tie is one half."""
    return sum((x > 0) + 0.5 * (x == 0) for x in gaps) / len(gaps)


PAIRS = {
    "gspo": [(0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 1, 2), (0, 3, 2), (1, 0, 1), (1, 0, 3), (1, 2, 1), (1, 2, 3)],
    "online_dpo": [(0, 0, 2), (1, 0, 1)],
    "spin": [(g, 4, i) for g, i in product(range(3), range(4))],
}


@pytest.mark.parametrize("algorithm", PAIRS)
def test_a_half_when_the_round_begins_and_then_the_share_in_the_right_order(sampled, algorithm):
    _, keep = sampled
    models, rollout, kept = keep(
        f"objective.algorithm={algorithm}", "objective.anchor=opponent", "objective.after_fork=0.3"
    )
    pairs = PAIRS[algorithm]
    assert kept.measure(models) == {
        "preference_accuracy": 0.5,
        "ranking_loss": pytest.approx(1.0),
        "heldout/gap_mean": pytest.approx(0.0, abs=1e-9),
        "heldout/pairs": len(pairs),
    }
    before = models.logprobs_under(models.policy, rollout)
    move(models.policy)
    lead = models.logprobs_under(models.policy, rollout) - before
    after = 0.3 if algorithm == "gspo" else 1.0
    gaps = [gap(lead, rollout.tokens, rollout.lengths, *pair, after) for pair in pairs]
    assert algorithm == "online_dpo" or min(gaps) < 0 < max(gaps), "some are right, some wrong"
    found = kept.measure(models)
    assert found["preference_accuracy"] == pytest.approx(in_order(gaps))
    beta = models.cfg.objective.preference_beta
    assert found["heldout/gap_mean"] == pytest.approx(beta * sum(gaps) / len(gaps), rel=1e-4)


@pytest.mark.parametrize(("anchor", "at_first"), [("old", 0.5), ("initial", 0.5), ("none", None)])
def test_what_is_subtracted(sampled, anchor, at_first):
    """The opponent for `old`, whose own anchor is the policy at any time; nothing for the literal formula."""
    _, keep = sampled
    models, rollout, kept = keep(f"objective.anchor={anchor}", "objective.after_fork=0.3")
    if anchor == "none":
        l = models.logprobs_under(models.policy, rollout)  # noqa: E741
        gaps = [gap(l, rollout.tokens, rollout.lengths, *pair, 0.3) for pair in PAIRS["gspo"]]
        at_first = in_order(gaps)
    assert kept.measure(models)["preference_accuracy"] == pytest.approx(at_first)
    move(models.policy)
    assert kept.measure(models)["preference_accuracy"] != 0.5


def test_a_checkpoint_keeps_them_and_other_prompts_take_what_both_have(sampled):
    prompts, keep = sampled
    models, _, kept = keep()
    tensors = kept.tensors()
    move(models.policy)
    again = HeldOutPairs.read(tensors, prompts)
    assert again.measure(models) == kept.measure(models)
    assert HeldOutPairs.read(tensors, [*prompts, prompts[0]]).measure(models) == kept.measure(models)
    assert HeldOutPairs.read(tensors, prompts[:1]).measure(models)["heldout/pairs"] == 5
    assert HeldOutPairs.read(tensors, []) is None and HeldOutPairs.read({}, prompts) is None


def test_no_pairs_no_metrics(sampled):
    prompts, keep = sampled
    models, rollout, _ = keep()
    assert HeldOutPairs.keep(prompts, [0, 1, 2], rollout, torch.zeros(3, 4), models).measure(models) == {}


def test_more_prompts_than_a_batch_has_are_measured_less_often(sampled):
    _, _, kept = sampled[1]()
    assert [kept.steps_between(batch) for batch in (64, 3, 2, 1)] == [5, 5, 10, 15]

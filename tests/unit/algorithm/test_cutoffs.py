"""What is learned from responses that were cut off."""

import pytest
import torch

from gspo.algorithm.cutoffs import learned_pairs, learned_rewards
from gspo.algorithm.objective import ALGORITHMS, Counts
from gspo.algorithm.pairs import forks, preferences
from gspo.config import Config, Objective
from gspo.errors import UserError
from gspo.launch_checks import check_cutoffs
from gspo.types import Groups

REWARDS = torch.tensor([[1.0, 0.0, 1.0, 0.4], [0.2, 0.9, 0.1, 0.0], [0.5, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
ENDED = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
MARGIN = 0.1


def pairs(how):
    beats = preferences(learned_rewards(REWARDS, ENDED, how, MARGIN), MARGIN)
    return learned_pairs(beats, ENDED, how)


def test_kept_they_count_as_scored():
    assert learned_rewards(REWARDS, ENDED, "keep", MARGIN) is REWARDS
    assert pairs("keep").equal(preferences(REWARDS, MARGIN))


def test_those_that_lose_are_beaten_by_all_that_ended_and_by_no_more_than_that_among_themselves():
    rewards, beats, scored = (
        learned_rewards(REWARDS, ENDED, "lose", MARGIN),
        pairs("lose"),
        preferences(REWARDS, MARGIN),
    )
    assert rewards[0].tolist() == pytest.approx([1.0, 0.0, -0.101, -0.701]), "1.0 and 0.4 less 1.101"
    assert rewards[1].tolist() == pytest.approx([0.2, 0.9, 0.1, -0.001], abs=1e-6), (
        "behind 0.1 by a little more than the margin"
    )
    assert rewards[2:].equal(REWARDS[2:]), "with none or all ended nothing changes"
    ended_over_cut = ENDED[:, :, None] & ~ENDED[:, None, :]
    assert beats[ended_over_cut].all() and not beats.transpose(1, 2)[ended_over_cut].any()
    assert beats[~(ended_over_cut | ended_over_cut.transpose(1, 2))].equal(
        scored[~(ended_over_cut | ended_over_cut.transpose(1, 2))]
    )


def test_those_that_are_skipped_are_in_no_pair():
    beats, both = pairs("skip"), ENDED[:, :, None] & ENDED[:, None, :]
    assert beats.equal(preferences(REWARDS, MARGIN) & both) and not beats[2].any()


@pytest.mark.parametrize("name", ["gspo", "rloo", "dr_grpo", "grpo", "tempo", "online_dpo"])
def test_skipped_tokens_have_no_coefficient_and_others_still_do(name):
    generator = torch.Generator().manual_seed(0)
    tokens, lengths = torch.randint(0, 3, (4, 4, 5), generator=generator), torch.full((4, 4), 5)
    logprobs = (-torch.rand(4, 4, 5, dtype=torch.float64, generator=generator)).requires_grad_()
    rewards = learned_rewards(REWARDS.double(), ENDED, "skip", MARGIN)
    groups = Groups(torch.zeros(4, 4, 5).double(), rewards, pairs("skip"), forks(tokens, lengths), lengths)
    cfg = Objective(algorithm=name, use_ranking_loss=False)
    terms = ALGORITHMS[name].loss(logprobs, groups, cfg, Counts(4, 1.0))
    sum(terms.values()).backward()
    # an objective may push a shared beginning as its group's average does; a response of its own it leaves alone
    skipped = logprobs.grad[~ENDED & ENDED.any(1, keepdim=True)]
    if name == "tempo":
        skipped = skipped.sum(-1)
    assert skipped.abs().max() < 1e-12 and not logprobs.grad[2].any() and logprobs.grad[ENDED].abs().max() > 1e-3


@pytest.mark.parametrize(("how", "algorithm"), [("lose", "spin"), ("skip", "spin"), ("lose", "maxrl")])
def test_what_an_objective_cannot_do_is_an_error(how, algorithm):
    cfg = Config(objective=Objective(algorithm=algorithm))
    check_cutoffs(cfg)
    cfg.rollout.on_cutoff = how
    with pytest.raises(
        UserError, match=f"rollout.on_cutoff = {how} does not go with objective.algorithm = {algorithm}"
    ):
        check_cutoffs(cfg)

"""The numbers of a step against hand-computed ones, and merged over ranks as if there were one."""

import math
from dataclasses import replace

import pytest
import torch

from gspo.algorithm.gold_solutions import prefer_solutions
from gspo.algorithm.pairs import forks, preferences
from gspo.config import Objective
from gspo.metrics.step_metrics import Clock, Meter, observe, training_pairs
from gspo.types import Experience, Groups, Prompt, Rollout, Scores, Update

REWARDS = torch.tensor([[1.0, 0.0], [0.1, 0.1]])
LENGTHS = torch.tensor([[2, 1], [3, 3]])
LOGPROBS = torch.tensor([[[-1.0, -2, 0], [-4, 0, 0]], [[-1, -1, -1], [-2, -2, -2]]])
REFERENCE = torch.tensor([[[-1.5, -2, 0], [-4, 0, 0]], [[-1, -1, -1], [-2, -2, -1]]])


def an_experience(g):
    prompts = [Prompt(i, (1,), "", "", "") for i in g]
    sampled = (LOGPROBS + 0.01 * (torch.arange(3) < LENGTHS[..., None]))[g]
    entropy = 0.5 * (torch.arange(3) < LENGTHS[..., None]).float()[g]
    finished = torch.tensor([[True, True], [True, False]])[g]
    tokens = torch.arange(7, 13).view(1, 2, 3).repeat(len(g), 1, 1)
    rollout = Rollout(prompts, tokens, LENGTHS[g], sampled, entropy, finished, [["", ""]] * len(g))
    apart = forks(tokens, LENGTHS[g])
    groups = Groups(REFERENCE[g], REWARDS[g], preferences(REWARDS[g], 0.1), apart, LENGTHS[g])
    exp = Experience(rollout, groups, REFERENCE[g], g, 2, 1)
    return exp, Update(LOGPROBS[g], {"preference": 0.25 * len(g)}, [1.0, 3.0])


def step(groups=(0, 1)):
    """Two prompts of two answers; `groups` is the part that a rank sees."""
    g = list(groups)
    exp, update = an_experience(g)
    parts = {"acc": torch.tensor([[1.0, 0.0], [math.nan, 1.0]])[g]}
    return observe(exp, Scores(REWARDS[g], parts), update, Objective(preference_beta=0.2))


def test_one_rank_by_hand():
    m = Meter.merge([step().state()])
    assert m["reward/batch_mean"] == pytest.approx((1.0 + 0.0 + 0.1 + 0.1) / 4)
    assert m["reward/batch_max"] == pytest.approx((1.0 + 0.1) / 2)
    assert m["reward/acc"] == pytest.approx(2 / 3), "what a response did not report is not counted"
    assert m["reward/acc/returned"] == 3 / 4
    assert (m["pairs/per_group"], m["pairs/groups_without"]) == (0.5, 0.5)
    assert (m["response/length_mean"], m["response/length_max"], m["response/cutoff"]) == (9 / 4, 3, 1 / 4)
    assert m["tokens"] == 9 and m["entropy"] == pytest.approx(0.5)
    assert m["mismatch"] == pytest.approx(0.01, rel=1e-3)
    # Two tokens differ from the reference: d = 0.5 and d = -1; k3 = exp(-d) - 1 + d.
    assert m["kl_divergence"] == pytest.approx((math.exp(-0.5) - 0.5 + math.exp(1.0) - 2.0) / 9)
    assert m["winner_logprob"] == -1.5, "the only winner, -1 - 2 over two tokens"
    # The only pair: s = 0.2 * (0.5, 0), so the winner leads by 0.1.
    assert m["pairs/accuracy_train"] == 1.0 and m["pairs/gap_std"] == pytest.approx(0.0, abs=1e-6)
    assert m["pairs/ranking_train"] == pytest.approx(math.log(1 + math.exp(-0.1)) / math.log(2), rel=1e-6)
    assert m["grad_norm"] == 2.0 and m["loss/total"] == m["loss/preference"] == 0.5


def test_what_a_branch_copied_was_not_sampled():
    """One branch, a copy of all three tokens of its trunk."""
    exp, update = an_experience([0, 1])
    rollout = replace(exp.rollout, copied=torch.tensor([[0, 0], [0, 3]]), prefilled=torch.tensor([1, 5]))
    m = observe(replace(exp, rollout=rollout), Scores(REWARDS), update, Objective())
    m = Meter.merge([m.state()])
    assert m["tokens"] == 9 - 3 and m["tokens_prefilled"] == 6 and m["response/length_mean"] == 9 / 4
    assert m["branches/copied"] == 3 and m["branches/without_place"] == 1
    plain = Meter.merge([step().state()])
    assert plain["tokens_prefilled"] == 2 and not any(name.startswith("branches/") for name in plain)


def test_two_ranks_merge_to_the_numbers_of_one():
    one, two = Meter.merge([step().state()]), Meter.merge([step([0]).state(), step([1]).state()])
    assert two == pytest.approx(one)


def test_a_rank_without_prompts_changes_nothing():
    alone, with_idle = Meter.merge([step().state()]), Meter.merge([step().state(), step([]).state()])
    idle = {k: v for k, v in with_idle.items() if k != "grad_norm"}
    assert idle == pytest.approx({k: v for k, v in alone.items() if k != "grad_norm"})


def test_a_step_without_pairs_has_no_winners():
    assert "winner_logprob" not in Meter.merge([step([1]).state()])


@pytest.mark.parametrize(("algorithm", "share"), [("gspo", 4 / 5), ("grpo", None)])
def test_of_differing_rewards_those_within_the_margin_are_counted_where_it_is_used(algorithm, share):
    exp, update = an_experience([0, 1])
    rewards = torch.tensor([[0.0, 0.1, 0.1, 0.2], [0.5, 0.5, 0.5, 0.5]])  # five twos differ: one by 0.2, four by 0.1
    twice = {k: torch.cat([getattr(exp.rollout, k)] * 2, 1) for k in ("tokens", "lengths", "logprobs", "entropy")}
    flags = {k: torch.cat([getattr(exp.rollout, k)] * 2, 1) for k in ("finished", "sampled", "copied")}
    rollout, anchors = replace(exp.rollout, **twice, **flags), torch.cat([REFERENCE, REFERENCE], 1)
    beats = preferences(rewards, 0.1)
    groups = Groups(anchors, rewards, beats, forks(rollout.tokens, rollout.lengths), rollout.lengths)
    wide = Experience(rollout, groups, anchors, [0, 1], 2, int(beats.sum()))
    update = replace(update, logprobs=torch.cat([LOGPROBS, LOGPROBS], 1))
    m = Meter.merge([observe(wide, Scores(rewards), update, Objective(algorithm=algorithm, margin=0.1)).state()])
    assert m.get("pairs/within_margin") == share


@pytest.mark.parametrize(("algorithm", "without"), [("gspo", 1.0), ("grpo", 0.5)])
def test_a_prompt_teaches_nothing_by_the_margin_only_where_the_algorithm_has_one(algorithm, without):
    """Rewards of 0.1 and 0, and of 0.1 and 0.1, at a margin of 0.1: GRPO's advantages of the first are not 0."""
    exp, update = an_experience([0, 1])
    rewards = torch.tensor([[0.1, 0.0], [0.1, 0.1]])
    groups = replace(exp.groups, rewards=rewards, beats=preferences(rewards, 0.1))
    cfg = Objective(algorithm=algorithm, margin=0.1)
    m = Meter.merge([observe(replace(exp, groups=groups), Scores(rewards), update, cfg).state()])
    assert (m["pairs/groups_without"], m["pairs/per_group"]) == (without, 0.0)


def test_winners_count_once_however_many_they_beat():
    exp, update = an_experience([0, 1])
    beats = torch.zeros(2, 4, 4, dtype=torch.bool)
    beats[0, 0, 1] = beats[0, 0, 3] = beats[1, 1, 0] = True  # -1.5 a token beats two, -2 one

    def twice(x):
        return torch.cat([x, x], 1)

    r = exp.rollout
    fields = {
        k: twice(getattr(r, k)) for k in ("tokens", "lengths", "logprobs", "entropy", "finished", "sampled", "copied")
    }
    wide = replace(r, **fields)
    apart = forks(wide.tokens, wide.lengths)
    reference, pairs = twice(REFERENCE), int(beats.sum())
    groups = Groups(reference, twice(REWARDS), beats, apart, wide.lengths)
    wide = Experience(wide, groups, reference, [0, 1], 2, pairs)
    m = observe(wide, Scores(twice(REWARDS)), replace(update, logprobs=twice(LOGPROBS)), Objective())
    assert Meter.merge([m.state()])["winner_logprob"] == pytest.approx((-1.5 - 2.0) / 2)


def ranked(rewards, lead):
    """The metrics of a group of these rewards, whose implicit rewards are `lead` times them."""
    n = len(rewards)
    rewards, anchors = torch.tensor([rewards]), torch.zeros(1, n, 1)
    logprobs = lead * rewards[..., None]
    tokens, lengths = torch.arange(n).view(1, n, 1), torch.ones(1, n, dtype=torch.long)
    real = torch.ones(1, n, dtype=torch.bool)
    rollout = Rollout([Prompt(0, (1,), "", "", "")], tokens, lengths, logprobs, anchors, real, [[""] * n])
    beats = preferences(rewards, 0.1)
    groups = Groups(anchors, rewards, beats, forks(tokens, lengths), lengths)
    exp = Experience(rollout, groups, anchors, [0], 1, int(beats.sum()))
    return Meter.merge([observe(exp, Scores(rewards), Update(logprobs), Objective(preference_beta=1.0)).state()])


def test_the_ranking_loss_is_1_at_a_rounds_beginning_and_falls_with_the_leads_however_many_pairs_there_are():
    """With graded rewards a good run has ever more pairs: from 3 in a group to 28."""
    few, many = [0.0, 0.0, 0.0, 1.0], [i / 7 for i in range(8)]
    for rewards in (few, many):
        values = [ranked(rewards, lead)["pairs/ranking_train"] for lead in (0.0, 0.5, 1.0, 2.0)]
        assert values[0] == pytest.approx(1.0) and values == sorted(values, reverse=True) and values[-1] < 0.75
        assert ranked(rewards, -1.0)["pairs/ranking_train"] > 1.0
    assert (ranked(few, 0.0)["pairs/per_group"], ranked(many, 0.0)["pairs/per_group"]) == (3, 28)


def test_an_algorithm_is_measured_by_its_own_gaps_on_its_own_pairs():
    """Three samples of rewards 1, 0.5 and 0, and a gold solution; what follows the fork weighs against the winner."""
    rewards = torch.tensor([[1.0, 0.5, 0.0, 1.0]])
    at_fork, behind = torch.tensor([3.0, 2.0, 1.0, 2.5]), torch.tensor([-4.0, 0.0, 0.0, 0.0])  # whole: -1, 2, 1, 2.5
    logprobs, anchors = torch.stack([at_fork, behind], -1)[None], torch.zeros(1, 4, 2)
    tokens, lengths = torch.arange(8).view(1, 4, 2), torch.full((1, 4), 2)
    real = torch.ones(1, 4, dtype=torch.bool)
    sampled = torch.tensor([[True, True, True, False]])

    def accuracy(algorithm, members):
        t, n, lp, zeros, ended, own, r = (
            x[:, :members] for x in (tokens, lengths, logprobs, anchors, real, sampled, rewards)
        )
        rollout = Rollout([Prompt(0, (1,), "", "", "")], t, n, lp, zeros, ended, [[""] * members], own)
        beats = prefer_solutions(preferences(r, 0.1), own)
        exp = Experience(rollout, Groups(zeros, r, beats, forks(t, n), n), zeros, [0], 1, int(beats.sum()))
        cfg = Objective(algorithm=algorithm, after_fork=0.0)
        return Meter.merge([observe(exp, Scores(rewards[:, :3]), Update(lp), cfg).state()])["pairs/accuracy_train"]

    assert accuracy("gspo", 3) == 1.0, "all three pairs, at the fork"
    assert accuracy("online_dpo", 3) == 0.0, "the best and the worst, whole: -1 against 1"
    assert accuracy("spin", 4) == 1.0, "the solution against each sample, whole: 2.5 against -1, 2 and 1"


def test_the_training_batchs_pairs_stand_in_where_there_are_no_held_out_ones():
    own = {"pairs/accuracy_train": 0.3, "pairs/ranking_train": 1.2}
    assert training_pairs(own) == {"preference_accuracy": 0.3, "ranking_loss": 1.2}
    assert training_pairs({"pairs/ranking_train": 1.2}) == {"ranking_loss": 1.2}
    assert training_pairs(own | {"heldout/pairs": 9.0}) == {}


def test_a_group_left_out_for_a_fault_does_not_count_in_the_reward():
    exp, update = an_experience([0, 1])
    scores = Scores(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), skipped=[1], errors=1, timeouts=2, calls=12)
    m = Meter.merge([observe(exp, scores, update, Objective()).state()] * 2)
    assert (m["reward/batch_mean"], m["reward/batch_max"]) == (0.5, 1.0)
    assert (m["reward/errors"], m["reward/timeouts"], m["reward/faults"]) == (2, 4, 6 / 24)


def test_a_reward_part_is_a_mean_over_the_responses_that_have_it_and_says_how_many_have():
    """Of 12 responses on three ranks, 4 + 0 + 1 have `brevity`, all but a group left out have `right`."""
    exp, update = an_experience([0, 1])
    nothing = math.nan
    brevity = [[[0.2, 0.4], [0.6, 0.8]], None, [[nothing, nothing], [nothing, 1.0]]]
    right = [[[1.0, 1.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, nothing]], [[0.0, 1.0], [1.0, 1.0]]]
    states = []
    for mine, answers in zip(brevity, right, strict=True):
        parts = {"right": torch.tensor(answers)} | ({} if mine is None else {"brevity": torch.tensor(mine)})
        scores = Scores(REWARDS, parts, skipped=[1] if mine is None else [])
        states.append(observe(exp, scores, update, Objective()).state())
    m = Meter.merge(states)
    assert m["reward/brevity"] == pytest.approx((0.2 + 0.4 + 0.6 + 0.8 + 1.0) / 5)
    assert m["reward/brevity/returned"] == 5 / 10
    assert m["reward/right"] == pytest.approx((3 + 2 + 3) / 10)
    assert "reward/right/returned" not in m, "every response that counts has it"


def test_tokens_a_second_of_the_step_and_of_sampling(monkeypatch):
    """Sampling from 1 to 5 s, the update from 5 to 10 s: 80 tokens in 4 s, and in 10."""
    times = iter([0.0, 1.0, 5.0, 5.0, 10.0, 10.0])
    monkeypatch.setattr("gspo.metrics.step_metrics.time.perf_counter", lambda: next(times))
    clock = Clock(torch.device("cpu"))
    with clock("rollout"):
        pass
    with clock("update"):
        pass
    seconds = {"time/rollout": 4.0, "time/update": 5.0, "time/step": 10.0}
    assert clock.metrics(80) == {**seconds, "tokens_per_second": 8.0, "tokens_per_second/rollout": 20.0}

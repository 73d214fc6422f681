"""Rewards of any finite range: what is a reward, what a fault scores, and from which reward on a response is right."""

import math

import pytest
import torch

from gspo.config import Reward
from gspo.errors import UserError
from gspo.metrics.evaluation import Answers, correct_of, summarise, table
from gspo.reward.gold_check import check_gold, find_correct_at, require_gold
from gspo.reward.scorer import Scorer
from gspo.types import Prompt, Scores

SIGNS = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "broken":
        raise KeyError("x")
    return {high} if solution_str == ground_truth else {low}
"""
RANKS = """
def rank_responses(responses, ground_truth, data_source):
    good = [r == ground_truth for r in responses]
    return [(i, {score}) for i, g in enumerate(good)]
"""
PROMPTS = [Prompt(i, (1,), f"q{i}", str(i), "a") for i in range(3)]


@pytest.fixture()
def scorer(tmp_path):
    made = []

    def scorer(source, **settings):
        (tmp_path / "mine.py").write_text(source)
        made.append(Scorer(Reward(path=str(tmp_path / "mine.py"), workers=1, **settings)))
        return made[-1]

    yield scorer
    for each in made:
        each.of_each.close()
        each.close()


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 2), (-3.5, 100)])
def test_rewards_are_taken_as_they_are_and_the_best_is_right(scorer, low, high, capsys):
    mine = scorer(SIGNS.format(low=low, high=high))
    assert mine.score_texts(PROMPTS[:1], [["0", "5"]]).rewards.tolist() == [[high, low]]
    assert require_gold(mine, PROMPTS, 16) == high
    said = f"right from a reward of {high:g} on" in capsys.readouterr().out
    assert said is (high != 1), "it is said where it is not 1"


def test_a_fault_never_beats_a_wrong_answer(scorer):
    mine = scorer(SIGNS.format(low=-1, high=1))
    assert mine.score_texts(PROMPTS[:1], [["0", "5", "broken"]]).rewards.tolist() == [[1, -1, -1]]
    mine = scorer(SIGNS.format(low=-1, high=1), range=[-2.0, 1.0])
    assert mine.score_texts(PROMPTS[:1], [["0", "5", "broken"]]).rewards.tolist() == [[1, -1, -2]]
    mine = scorer(SIGNS.format(low=0, high=1))
    assert mine.score_texts(PROMPTS[:1], [["0", "5", "broken"]]).rewards.tolist() == [[1, 0, 0]]


def test_what_lies_outside_of_the_range_is_a_fault(scorer):
    mine = scorer(SIGNS.format(low=-1, high=3), range=[-1.0, 1.0])
    scores = mine.score_texts(PROMPTS[:1], [["0", "5"]])
    assert scores.errors == 1 and scores.rewards.tolist() == [[-1, -1]]
    assert "returned 3; it must return a number from -1 to 1 (reward.range)" in scores.first_fault
    assert "on the response '0'" in scores.first_fault and "ground truth '0'" in scores.first_fault
    for wrong in ([1.0], [1.0, 1.0], [2.0, 1.0]):
        with pytest.raises(UserError, match=r"reward.range = .* \[lowest, highest\]"):
            Scorer(Reward(range=wrong))


@pytest.mark.parametrize(
    ("settings", "correct_at"), [({}, 2.0), ({"range": [-1.0, 2.0]}, 2.0), ({"correct_at": 0.0}, 0.0)]
)
def test_correct_at_is_the_configured_one_the_top_of_the_range_or_the_highest_of_right_answers(
    scorer, settings, correct_at
):
    mine = scorer(SIGNS.format(low=-1, high=2), **settings)
    assert find_correct_at(mine, PROMPTS, 16) == correct_at


def test_right_answers_below_one_do_not_lower_what_is_right_and_what_follows_is_said(scorer, capsys):
    mine = scorer(SIGNS.format(low=0, high=0.9))
    assert find_correct_at(mine, PROMPTS, 16) == require_gold(mine, PROMPTS, 16) == 1.0
    (said,) = capsys.readouterr().out.splitlines()
    assert "gives none of 3 sampled right answers 1 or more, so nothing counts as right" in said
    assert "Set reward.correct_at=0.9, or return `acc`" in said


def test_acc_decides_and_else_the_reward():
    rewards = torch.tensor([[2.0, 1.0, -1.0, 1.9999999]])
    assert correct_of(Scores(rewards), 2.0).tolist() == [[1, 0, 0, 1]]
    acc = {"acc": torch.tensor([[0.0, math.nan, 1.0, 0.4]], dtype=torch.float64)}
    assert correct_of(Scores(rewards, acc), 2.0).tolist() == [[0, 0, 1, 0]]


def test_a_function_that_fails_on_wrong_answers_is_refused_and_its_call_is_named(scorer):
    fails = SIGNS.format(low="1 / 0", high=1)
    check = check_gold(scorer(fails), PROMPTS, 16)
    assert check.refused and check.unscored == 3 and check.compared == 0
    assert "failed on every wrong answer to 3 of 3 sampled rows" in check.verdict()
    assert "ZeroDivisionError" in check.verdict() and "on the response" in check.verdict()


# ---- rewards that compare within a group only ----


def test_a_ranking_alone_makes_no_accuracy(scorer, capsys):
    mine = scorer(RANKS.format(score="1.0 if g else 0.0"))
    assert require_gold(mine, PROMPTS, 16) == 1.0 and "no accuracy is shown" in capsys.readouterr().out
    scores = mine.of_each.score_texts(PROMPTS[:1], [["0"]])
    assert mine.of_each is mine and correct_of(scores, mine.correct_at, mine.ranks).isnan().all()


def test_a_ranking_may_say_what_is_right(scorer):
    mine = scorer(RANKS.format(score="{'score': -i, 'acc': float(g)}"))
    scores = mine.score_texts(PROMPTS[:1], [["5", "0"]])
    assert scores.rewards.tolist() == [[0, -1]]
    assert correct_of(scores, mine.correct_at, mine.ranks).tolist() == [[0, 1]]


def test_beside_a_ranking_compute_score_says_what_is_right(scorer, capsys):
    mine = scorer(SIGNS.format(low=-1, high=2) + RANKS.format(score="float(i == 0)"))
    assert mine.ranks and mine.score_texts(PROMPTS[:1], [["5", "0"]]).rewards.tolist() == [[1, 0]]
    each = mine.of_each
    assert not each.ranks and each.score_texts(PROMPTS[:1], [["5", "0"]]).rewards.tolist() == [[-1, 2]]
    assert find_correct_at(mine, PROMPTS, 16) == 2.0
    assert "accuracy is by compute_score" in capsys.readouterr().out


def test_a_table_without_accuracy_has_rewards_only():
    answers = Answers(["a"], torch.tensor([[1.0, 0.0]]).numpy(), None, None, [["1", "2"]])
    found = summarise(answers)
    assert set(found["interval"]) == {"reward_mean"} and found["reward_mean"] == 0.5
    assert "pass@1" not in table({"all": found}) and "reward_mean" in table({"all": found})

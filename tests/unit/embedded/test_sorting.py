"""The embedded task of sorting: right answers, what each mistake earns, and a reward for each number in its place."""

import random
import re
from itertools import chain

import pytest

from benchmarks.sorting_reward import compute_score
from gspo.embedded.sorting import HABITS, KINDS, TASK, all_problems, solution_of_kind, split_problems, worked_solution
from gspo.embedded.task import SPLIT_SIZES, make_rows

GOLD = "-3, 9, 12, 31"


@pytest.fixture(scope="module")
def splits():
    return split_problems()


def numbers_of(text):
    return [int(n) for n in re.findall(r"-?\d+", text)]


def score(text, gold=GOLD):
    return compute_score("sorting_en", text, gold)


def test_no_four_numbers_are_in_two_problems_whatever_their_order():
    sets = [frozenset(p.numbers) for p in all_problems()]
    assert len(sets) == len(set(sets)) == 10_000


def test_the_stated_answer_is_the_sorted_prompt(splits):
    for row in chain(*make_rows(TASK, splits, SPLIT_SIZES).values()):
        down = re.search("large to small|descending|从大到小|降序", row["prompt"]) is not None
        assert numbers_of(row["ground_truth"]) == sorted(numbers_of(row["prompt"]), reverse=down), row
        assert score(row["solution"], row["ground_truth"]) == 1.0, row


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_mistake_costs_and_most_leave_something(splits, language):
    rng = random.Random(0)
    for p in splits["warm"][:2000]:
        gold = TASK.ground_truth(p, language)
        kinds = [k for k in KINDS if k != "habit" or p.shape in HABITS]
        earned = {k: score(solution_of_kind(p, language, rng, k), gold) for k in kinds}
        assert earned.pop("right") == 1.0
        assert earned["swapped"] == 0.5
        assert all(0.0 <= e <= 0.75 for e in earned.values()), (p, earned)


def test_what_a_habit_is_for_each_shape(splits):
    first = {shape: next(p for p in splits["warm"] if p.shape == shape) for shape in HABITS}
    wrong = {
        shape: numbers_of(solution_of_kind(p, "en", random.Random(0), "habit").split("\n")[1])
        for shape, p in first.items()
    }
    assert wrong["descending"] == sorted(first["descending"].numbers)
    assert [*map(str, wrong["lengths"])] == sorted(map(str, first["lengths"].numbers))
    assert [abs(n) for n in wrong["negative"]] == sorted(abs(n) for n in first["negative"].numbers)


def test_a_pupils_rewards_are_graded(splits):
    rng = random.Random(1)
    earned = [score(worked_solution(p, "en", rng, True), TASK.ground_truth(p, "en")) for p in splits["warm"]]
    assert {*earned} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert 0.4 < earned.count(1.0) / len(earned) < 0.5
    assert sum(0.0 < e < 0.7 for e in earned) / len(earned) > 0.2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Answer: -3, 9, 12, 31", 1.0),
        ("答案：−3，9、12, 31。", 1.0),
        ("Answer: 9, -3, 12, 31", 0.5),
        ("Answer: 31, 12, 9, -3", 0.0),
        ("Answer: 9, 12, 31", 0.0),  # all but one are there, none in its place
        ("Answer: -3, 9, 12", 0.75),
        ("Answer: -3, 9, 12, 31, 31, 31, 31, 31", 0.5),
        ("Answer: 1, 1, 1, 1\nAnswer: -3, 9, 12, 31", 1.0),
        ("Answer: -3, 9, 12, 31\nAnswer: 1, 1, 1, 1", 0.0),
        ("Answer: -3, 9, 12, 31 or so", 0.0),
        ("Answer: -3, 9, 12, 3e1", 0.0),
        ("Answer: -3, 9, , 12, 31", 0.0),
        ("-3, 9, 12, 31", 0.0),
        ("Answer:\n-3, 9, 12, 31", 0.0),
        ("", 0.0),
    ],
)
def test_levels_of_the_reward(line, expected):
    assert score(line) == expected == score(f"Halves: -3, 12 | 9, 31\n{line}")


@pytest.mark.parametrize("piece", ["Answer:", "9, ", "9,", " ", ",", "答案：", "\ud800", "-"])
def test_hostile_texts_cost_little_and_earn_nothing(piece):
    assert score(piece * 200_000) == 0.0
    assert score(piece * 1000 + f"\nAnswer: {GOLD}") == 1.0


def test_a_ground_truth_of_another_task_is_refused():
    with pytest.raises(ValueError, match="9, 12, 31"):
        score("Answer: 7", "Sunday")

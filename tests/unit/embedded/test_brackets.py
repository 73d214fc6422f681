"""The embedded task of brackets: answers that close everything and no more, and a reward of all or nothing."""

import random
import re
from itertools import chain

import pytest

from benchmarks.brackets_reward import compute_score
from gspo.embedded.brackets import KINDS, SHAPES, TASK, solution_of_kind, split_problems, worked_solution
from gspo.embedded.task import SPLIT_SIZES, make_rows

PAIR = re.compile(r"\(\)|\[\]|\{\}|<>")
GOLD = ")]}>"


@pytest.fixture(scope="module")
def splits():
    return split_problems()


def reduced(text):
    """The text without the pairs that are closed."""
    while PAIR.search(text):
        text = PAIR.sub("", text)
    return text


def score(text, gold=GOLD):
    return compute_score("brackets_en", text, gold)


def test_the_stated_answer_closes_all_brackets_and_no_more(splits):
    seen = set()
    for row in chain(*make_rows(TASK, splits, SPLIT_SIZES).values()):
        brackets = re.search(r"[\[({<][][(){}<>]*$", row["prompt"]).group()
        assert reduced(brackets + row["ground_truth"]) == "", row
        still_open = reduced(brackets)
        assert len(still_open) == len(row["ground_truth"]) and f"{still_open}\n" in row["solution"], row
        assert score(row["solution"], row["ground_truth"]) == 1.0, row
        seen.add(brackets)
    assert len(seen) == sum(SPLIT_SIZES.values())  # also across languages


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_mistake_earns_nothing(splits, language):
    rng = random.Random(0)
    for p in splits["warm"][:2000]:
        earned = {k: score(solution_of_kind(p, language, rng, k), TASK.ground_truth(p, language)) for k in KINDS}
        assert earned.pop("right") == 1.0 and not any(earned.values()), (p, earned)


def test_what_a_habit_is_for_each_shape(splits):
    answers = {}
    for shape, text in zip(SHAPES, ("([{<", "([]{<", "([{}]<{"), strict=True):
        ours = next(p for p in splits["warm"] if p.shape == shape)
        opening = {"open": "([{<", "pairs": "([{<", "nested": "([<{"}[shape]
        p = type(ours)(text, shape, reduced(text), opening)
        answers[shape] = solution_of_kind(p, "en", random.Random(0), "habit")
    assert answers == {
        "open": "Open: ([{<\nAnswer: )]}>",  # in the order of opening
        "pairs": "Open: ([{<\nAnswer: >}])",  # ] is there already
        "nested": "Open: ([<{\nAnswer: }>])",  # so is ], around {}
    }


def test_a_pupil_is_right_less_than_half_of_the_time(splits):
    rng = random.Random(1)
    earned = [score(worked_solution(p, "en", rng, True), TASK.ground_truth(p, "en")) for p in splits["warm"]]
    assert sum(earned) / len(earned) == pytest.approx(0.36, abs=0.03)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Open: <{[(\nAnswer: )]}>", 1.0),
        ("未闭合：<{[(\n答案：）］｝＞", 1.0),
        ("answer: ) ] } > ", 1.0),
        ("Answer: >\nAnswer: )]}>", 1.0),
        ("Answer: )]}>\nAnswer: >", 0.0),
        ("Answer: )]}", 0.0),
        ("Answer: )]}>>", 0.0),
        ("Answer: the missing ones are )]}>", 0.0),
        ("Answer:\n)]}>", 0.0),
        (")]}>", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_is_all_or_nothing(text, expected):
    assert score(text) == expected


@pytest.mark.parametrize("piece", ["Answer:", ")]}>", " ", "答案：", "\ud800", "\n"])
def test_hostile_texts_cost_little_and_earn_nothing(piece):
    assert score(piece * 200_000) == 0.0
    assert score(piece * 1000 + f"\nAnswer: {GOLD}") == 1.0


def test_a_ground_truth_of_another_task_is_refused():
    with pytest.raises(ValueError, match="must be brackets"):
        score("Answer: 7", "7")

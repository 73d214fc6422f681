"""The embedded task of weekdays: right answers by Python's calendar, mistakes scored by the default reward."""

import random
import re
from datetime import date, timedelta
from itertools import chain

import pytest

from gspo.embedded.task import SPLIT_SIZES, make_rows
from gspo.embedded.weekdays import DAYS, HABITS, KINDS, TASK, solution_of_kind, split_problems, worked_solution
from gspo.reward.reward_func import compute_score

NUMBER = {name: i for names in DAYS.values() for i, name in enumerate(names)}
MONDAY = date(2024, 1, 1)


@pytest.fixture(scope="module")
def splits():
    return split_problems()


def asked(prompt):
    """(day of the week, days on) of a prompt in words."""
    day = NUMBER[re.search("|".join(NUMBER), prompt).group()]
    a, *b = (int(n) for n in re.findall(r"\d+", prompt))
    if re.search("weeks|周", prompt):
        return day, 7 * a + b[0]
    if b:
        return day, b[0] - a
    return day, -a if re.search("ago|前", prompt) else a


def test_the_stated_answer_is_the_calendars(splits):
    seen = set()
    for row in chain(*make_rows(TASK, splits, SPLIT_SIZES).values()):
        day, shift = asked(row["prompt"])
        assert NUMBER[row["ground_truth"]] == (MONDAY + timedelta(day + shift)).weekday(), row
        assert (row["ground_truth"] in DAYS["zh"]) == (row["data_source"] == "weekdays_zh")
        assert compute_score("", row["solution"], row["ground_truth"]) == 1.0, row
        seen.add((day, *re.findall(r"\d+", row["prompt"]), bool(re.search("weeks|周|ago|前", row["prompt"]))))
    assert len(seen) == sum(SPLIT_SIZES.values())  # also across languages


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_mistake_earns_a_tenth_and_is_calculated_rightly(splits, language):
    rng = random.Random(0)
    for p in splits["warm"][:250]:
        gold = TASK.ground_truth(p, language)
        kinds = [k for k in KINDS if k != "habit" or p.shape in HABITS]
        for kind in kinds:
            solution = solution_of_kind(p, language, rng, kind)
            assert compute_score("", solution, gold) == (1.0 if kind == "right" else 0.1), (p, solution)
            calculation, value = solution.split("\n")[0].split(" = ")
            assert eval(calculation) == int(value)


def test_what_a_habit_is(splits):
    for p in splits["warm"][:1500]:
        if p.shape in HABITS:
            answer = re.split(": |：", solution_of_kind(p, "en", random.Random(0), "habit"))[-1]
            counted = p.a + p.b if p.shape == "weeks" else p.a if p.shape == "before" else p.a - p.b
            assert NUMBER[answer] == (MONDAY + timedelta(p.day + counted)).weekday(), p


def test_a_pupil_is_right_less_than_half_of_the_time(splits):
    rng = random.Random(1)
    right = {True: [], False: []}
    for p in splits["warm"]:
        answer = re.split(": |：", worked_solution(p, "zh", rng, True))[-1]
        right[p.shape in HABITS].append(answer == TASK.ground_truth(p, "zh"))
    assert sum(right[True]) / len(right[True]) == pytest.approx(0.31, abs=0.03)
    assert sum(right[False]) / len(right[False]) == pytest.approx(0.48, abs=0.03)

"""The embedded task of weekdays: right answers by Python's calendar, mistakes scored by the default reward."""

import random
import re
from datetime import date, timedelta
from itertools import chain

import pytest

from gspo.embedded.task import SPLIT_SIZES, make_rows
from gspo.embedded.weekdays import DAYS, HABITS, KINDS, TASK, Problem, solution_of_kind, split_problems, worked_solution
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
    days = 7 * a + b[0] if b else a
    return day, -days if re.search("ago|前", prompt) else days


def test_the_stated_answer_is_the_calendars(splits):
    seen = set()
    for row in chain(*make_rows(TASK, splits, SPLIT_SIZES).values()):
        day, shift = asked(row["prompt"])
        assert NUMBER[row["ground_truth"]] == (MONDAY + timedelta(day + shift)).weekday(), row
        assert (row["ground_truth"] in DAYS["zh"]) == (row["data_source"] == "weekdays_zh")
        assert compute_score("", row["solution"], row["ground_truth"]) == 1.0, row
        seen.add((day, *re.findall(r"\d+", row["prompt"]), bool(re.search("ago|前", row["prompt"]))))
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
            assert len(solution.split("\n")) == (2 if p.b else 3)
            for calculation, value in re.findall(r"^(.+) = (.+)$", solution, re.MULTILINE):
                assert eval(calculation) == int(value)


def test_what_each_mistake_is():
    problem = Problem(4, "days ago", 23)  # Friday
    solutions = {kind: solution_of_kind(problem, "en", random.Random(0), kind) for kind in KINDS}
    assert solutions == {
        "right": "23 - 21 = 2\n1 Thursday, 2 Wednesday\nAnswer: Wednesday",
        "habit": "23 - 21 = 2\n1 Saturday, 2 Sunday\nAnswer: Sunday",
        "first day": "23 - 21 = 2\n1 Friday, 2 Thursday\nAnswer: Thursday",
        "slip": "23 - 21 = 2\n1 Thursday, 2 Wednesday, 3 Tuesday\nAnswer: Tuesday",
    }


def test_a_pupil_is_right_less_than_half_of_the_time(splits):
    rng = random.Random(1)
    right = {True: [], False: []}
    for p in splits["warm"]:
        answer = re.split(": |：", worked_solution(p, "zh", rng, True))[-1]
        right[p.shape in HABITS].append(answer == TASK.ground_truth(p, "zh"))
    assert sum(right[True]) / len(right[True]) == pytest.approx(0.38, abs=0.03)
    assert sum(right[False]) / len(right[False]) == pytest.approx(0.54, abs=0.03)

"""Generate an embedded task of counting days: which day of the week it is some days or weeks later or earlier.

In English and Chinese. `python -m gspo.embedded.weekdays [DIR]` writes `train.json`, `dev.json` and `test.json`. A
solution takes whole weeks away and counts the days that are left, one by one; the default reward function
(gspo/reward/reward_func.py) scores it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from gspo.embedded.task import SPLIT_SIZES, Task, deal, make_rows, program, write_rows

MODEL_DIR = Path(__file__).parent / "weekdays_model"
DATA_DIR = Path("data/weekdays")
DAYS = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "zh": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
}
PROMPTS = {
    ("en", "days"): "Today is {day}. Which weekday is it in {a} days?",
    ("en", "days ago"): "Today is {day}. Which weekday was it {a} days ago?",
    ("en", "weeks"): "Today is {day}. Which weekday is it in {a} weeks and {b} days?",
    ("en", "weeks ago"): "Today is {day}. Which weekday was it {a} weeks and {b} days ago?",
    ("zh", "days"): "今天是{day}，{a} 天后是星期几？",
    ("zh", "days ago"): "今天是{day}，{a} 天前是星期几？",
    ("zh", "weeks"): "今天是{day}，{a} 周零 {b} 天后是星期几？",
    ("zh", "weeks ago"): "今天是{day}，{a} 周零 {b} 天前是星期几？",
}
ANSWER = {"en": "Answer: {}", "zh": "答案：{}"}
HABITS = ("days ago", "weeks ago")  # in these shapes a pupil mostly counts forward
KINDS = ("right", "habit", "first day", "slip")
MIX = {  # has the shape a habit -> how often a pupil's solution is of each kind
    True: (0.38, 0.46, 0.09, 0.07),
    False: (0.54, 0.00, 0.28, 0.18),
}


@dataclass(frozen=True)
class Problem:
    """A day of the week, 0 for Monday, and how far away the asked day is: a days, or a weeks and b days."""

    day: int
    shape: str
    a: int
    b: int = 0

    @property
    def text(self) -> str:
        return f"{self.shape}: {self.day}, {self.a}, {self.b}"

    @property
    def left(self) -> int:
        """Return the days that whole weeks leave."""
        return self.b or self.a % 7

    @property
    def direction(self) -> int:
        return -1 if self.shape in ("days ago", "weeks ago") else 1

    @property
    def answer(self) -> int:
        return (self.day + self.direction * self.left) % 7


# ---- the problems ----


def all_problems() -> Iterator[Problem]:
    """Yield every problem of the task, in a fixed order; none that asks for the same day of the week."""
    for day in range(7):
        for shape, a in product(("days", "days ago"), range(8, 150)):
            if a % 7:
                yield Problem(day, shape, a)
        for shape, a, b in product(("weeks", "weeks ago"), range(2, 46), range(2, 7)):
            yield Problem(day, shape, a, b)


def split_problems() -> dict[str, list[Problem]]:
    """Return {train, dev, test, warm}: disjoint lists."""
    return deal(all_problems(), SPLIT_SIZES)


# ---- the pupil ----


def worked_solution(problem: Problem, language: str, rng: random.Random, mistakes: bool) -> str:
    """Return a solution as a pupil writes it; with `mistakes`, wrong as often as `MIX` says."""
    kind = rng.choices(KINDS, MIX[problem.shape in HABITS])[0] if mistakes else "right"
    return solution_of_kind(problem, language, rng, kind)


def solution_of_kind(problem: Problem, language: str, rng: random.Random, kind: str) -> str:
    """Return a solution with a mistake of this kind: `3 Monday` says that Monday is the third day counted."""
    direction = 1 if kind == "habit" else problem.direction
    last = problem.left + (kind == "slip")  # one day too many
    skipped = 1 if kind == "first day" else 0  # today is counted as the first day
    days = [(problem.day + direction * (i - skipped)) % 7 for i in range(1, last + 1)]
    lines = [f"{problem.a} - {problem.a // 7 * 7} = {problem.left}"] if not problem.b else []
    lines.append(", ".join(f"{i} {DAYS[language][day]}" for i, day in enumerate(days, 1)))
    return "\n".join([*lines, ANSWER[language].format(DAYS[language][days[-1]])])


def prompt_text(problem: Problem, language: str, rng: random.Random) -> str:
    """Return the problem as a question in this language."""
    return PROMPTS[language, problem.shape].format(day=DAYS[language][problem.day], a=problem.a, b=problem.b)


TASK = Task(
    "weekdays",
    MODEL_DIR,
    DATA_DIR,
    split_problems,
    prompt_text,
    worked_solution,
    lambda problem, language: DAYS[language][problem.answer],
)


def write_splits(folder: Path = DATA_DIR) -> None:
    """Write the three files, the same bytes every time."""
    write_rows(make_rows(TASK, split_problems(), SPLIT_SIZES), folder)


if __name__ == "__main__":
    program(write_splits, DATA_DIR, SPLIT_SIZES)

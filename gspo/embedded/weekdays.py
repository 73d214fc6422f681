"""Generate an embedded task with short answers: which day of the week it is some days later or earlier.

In English and Chinese. `python -m gspo.embedded.weekdays [DIR]` writes `train.json`, `dev.json` and `test.json`. A
solution is one calculation and the day; the default reward function (gspo/reward/reward_func.py) scores it.
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
    ("en", "after"): "Today is {day}. Which weekday is it in {a} days?",
    ("en", "before"): "Today is {day}. Which weekday was it {a} days ago?",
    ("en", "later"): "Day {a} is a {day}. Which weekday is day {b}?",
    ("en", "earlier"): "Day {a} is a {day}. Which weekday is day {b}?",
    ("en", "weeks"): "Today is {day}. Which weekday is it in {a} weeks and {b} days?",
    ("zh", "after"): "今天是{day}，{a} 天后是星期几？",
    ("zh", "before"): "今天是{day}，{a} 天前是星期几？",
    ("zh", "later"): "{a} 号是{day}，{b} 号是星期几？",
    ("zh", "earlier"): "{a} 号是{day}，{b} 号是星期几？",
    ("zh", "weeks"): "今天是{day}，{a} 周零 {b} 天后是星期几？",
}
ANSWER = {"en": "Answer: {}", "zh": "答案：{}"}
# What a pupil mostly does in these shapes: counts forward where it should count back, takes a week for a day.
HABITS = ("before", "earlier", "weeks")
KINDS = ("right", "habit", "first day", "slip")
MIX = {  # has the shape a habit -> how often a pupil's solution is of each kind
    True: (0.31, 0.51, 0.10, 0.08),
    False: (0.48, 0.00, 0.32, 0.20),
}


@dataclass(frozen=True)
class Problem:
    """A day of the week, 0 for Monday, and what is to be counted from it: days, days of a month, or weeks and days."""

    day: int
    shape: str
    a: int
    b: int = 0

    @property
    def text(self) -> str:
        return f"{self.shape}: {self.day}, {self.a}, {self.b}"

    @property
    def shift(self) -> int:
        """Return how many days on the asked day is."""
        return {"before": -self.a, "later": self.b - self.a, "earlier": self.b - self.a, "weeks": self.b}.get(
            self.shape, self.a
        )

    @property
    def answer(self) -> int:
        return (self.day + self.shift) % 7


# ---- the problems ----


def all_problems() -> Iterator[Problem]:
    """Yield every problem of the task, in a fixed order; none that asks for the same day of the week."""
    for day in range(7):
        for shape, a in product(("after", "before"), range(8, 150)):
            if a % 7:
                yield Problem(day, shape, a)
        for a, b in product(range(1, 32), repeat=2):
            if (b - a) % 7:
                yield Problem(day, "later" if b > a else "earlier", a, b)
        for a, b in product(range(2, 27), range(1, 7)):
            if a % 7:  # or else a week taken for a day would not be seen
                yield Problem(day, "weeks", a, b)


def split_problems() -> dict[str, list[Problem]]:
    """Return {train, dev, test, warm}: disjoint lists."""
    return deal(all_problems(), SPLIT_SIZES)


# ---- the pupil ----


def worked_solution(problem: Problem, language: str, rng: random.Random, mistakes: bool) -> str:
    """Return a solution as a pupil writes it; with `mistakes`, wrong as often as `MIX` says."""
    kind = rng.choices(KINDS, MIX[problem.shape in HABITS])[0] if mistakes else "right"
    return solution_of_kind(problem, language, rng, kind)


def solution_of_kind(problem: Problem, language: str, rng: random.Random, kind: str) -> str:
    """Return a solution with a mistake of this kind; what is calculated is right, what is counted is not."""
    line, shift = _calculation(problem), problem.shift
    if kind == "habit" and problem.shape == "weeks":
        shift = problem.a + problem.b
        line = f"{problem.a} + {problem.b} = {shift}"
    elif kind == "habit":
        shift = -shift
    elif kind == "first day":  # today is counted as the first day
        shift -= 1 if shift > 0 else -1
    elif kind == "slip":  # a day that is neither right nor any of the above
        wrong = {0, shift, -shift, shift - 1, shift + 1, problem.a + problem.b}
        shift = rng.choice([s for s in range(7) if s not in {w % 7 for w in wrong}])
    return f"{line}\n{ANSWER[language].format(DAYS[language][(problem.day + shift) % 7])}"


def _calculation(problem: Problem) -> str:
    """Return the line of working: the days that whole weeks leave, or those between two days of a month."""
    a, b = problem.a, problem.b
    if problem.shape in ("after", "before"):
        return f"{a} - {a // 7 * 7} = {a % 7}"
    if problem.shape == "weeks":
        return f"{a} * 7 = {a * 7}"
    return f"{max(a, b)} - {min(a, b)} = {abs(b - a)}"


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

"""Generate an embedded task with long answers and graded rewards: four numbers to be sorted, in English and Chinese.

`python -m gspo.embedded.sorting [DIR]` writes `train.json`, `dev.json` and `test.json`. A solution sorts the first
two and the last two numbers, then merges them; benchmarks/sorting_reward.py pays for every number in its place. No four
numbers are in two problems, in whatever order.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gspo.embedded.task import SPLIT_SIZES, Task, deal, make_rows, program, write_rows

MODEL_DIR = Path(__file__).parent / "sorting_model"
DATA_DIR = Path("data/sorting")
COUNT, HALF = 4, 2  # numbers of a problem, and of its first half
PER_SHAPE = 2500
PROMPTS = {
    ("en", False): ("Sort from small to large: {}", "Put in ascending order: {}"),
    ("en", True): ("Sort from large to small: {}", "Put in descending order: {}"),
    ("zh", False): ("从小到大排列：{}", "按升序排列：{}"),
    ("zh", True): ("从大到小排列：{}", "按降序排列：{}"),
}
WORKING = {"en": "Halves: {} | {}\nAnswer: {}", "zh": "两半：{} | {}\n答案：{}"}


def by_text(number: int) -> str:
    """Return what a pupil compares who sorts numbers like words: 12 comes before 5."""
    return str(number)


# The key by which a pupil mostly sorts a shape, which is wrong; and whether it sorts the other way round.
HABITS: dict[str, tuple[Callable[[int], int | str], bool]] = {
    "descending": (int, True),
    "lengths": (by_text, False),
    "negative": (abs, False),
}
KINDS = ("right", "habit", "unmerged", "swapped", "lost")
MIX = {  # has the shape a habit -> how often a pupil's solution is of each kind
    True: (0.42, 0.43, 0.05, 0.05, 0.05),
    False: (0.55, 0.00, 0.20, 0.15, 0.10),
}


@dataclass(frozen=True)
class Problem:
    """Four different numbers and the direction in which to sort them."""

    numbers: tuple[int, ...]
    shape: str

    @property
    def text(self) -> str:
        return f"{self.shape}: {written(self.numbers)}"

    @property
    def descending(self) -> bool:
        return self.shape == "descending"

    @property
    def answer(self) -> list[int]:
        return sorted(self.numbers, reverse=self.descending)


def written(numbers: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


# ---- the problems ----


def draw(shape: str, rng: random.Random) -> tuple[int, ...]:
    """Draw different numbers of a shape: two digits, one or two digits, or some below zero."""
    if shape == "lengths":
        lengths = [1, 2, rng.choice((1, 2)), 2]
        numbers = [rng.randrange(10 ** (n - 1), 10**n) for n in lengths]
    elif shape == "negative":
        below = rng.choice((2, 3))
        numbers = [rng.randint(1, 60) * (-1 if i < below else 1) for i in range(COUNT)]
    else:
        numbers = [rng.randint(10, 99) for _ in range(COUNT)]
    rng.shuffle(numbers)
    return tuple(numbers)


def all_problems() -> Iterator[Problem]:
    """Yield every problem of the task, in a fixed order; none in which a mistake gives the right order."""
    rng, seen = random.Random("sorting problems"), set()
    for shape in ("ascending", *HABITS):
        count = 0
        while count < PER_SHAPE:
            problem = Problem(draw(shape, rng), shape)
            names = frozenset(problem.numbers)
            if len(names) == COUNT and names not in seen and not _is_blurred(problem):
                seen.add(names)
                count += 1
                yield problem


def _is_blurred(problem: Problem) -> bool:
    """Return whether a habit, or leaving the halves unmerged, would give the right order, or a habit none at all."""
    key, _ = HABITS.get(problem.shape, (int, False))
    if len({key(n) for n in problem.numbers}) < COUNT:
        return True
    kinds = ("habit", "unmerged") if problem.shape in HABITS else ("unmerged",)
    return any(_sorted_as(problem, kind)[2] == problem.answer for kind in kinds)


def split_problems() -> dict[str, list[Problem]]:
    """Return {train, dev, test, warm}: disjoint lists."""
    return deal(all_problems(), SPLIT_SIZES)


# ---- the pupil ----


def worked_solution(problem: Problem, language: str, rng: random.Random, mistakes: bool) -> str:
    """Return a solution as a pupil writes it; with `mistakes`, wrong as often as `MIX` says."""
    kind = rng.choices(KINDS, MIX[problem.shape in HABITS])[0] if mistakes else "right"
    return solution_of_kind(problem, language, rng, kind)


def solution_of_kind(problem: Problem, language: str, rng: random.Random, kind: str) -> str:
    """Return a solution with a mistake of this kind: a habit in both lines, or a slip in the last."""
    first, second, merged = _sorted_as(problem, kind)
    if kind == "swapped":
        i = rng.randrange(COUNT - 1)
        merged[i], merged[i + 1] = merged[i + 1], merged[i]
    elif kind == "lost":
        del merged[rng.randrange(COUNT)]
    return WORKING[language].format(written(first), written(second), written(merged))


def _sorted_as(problem: Problem, kind: str) -> tuple[list[int], list[int], list[int]]:
    """Return the sorted halves and the merged numbers of a pupil with this habit, or with none."""
    key, reverse = int, problem.descending
    if kind == "habit":
        key, turned = HABITS[problem.shape]
        reverse ^= turned
    first, second = (sorted(h, key=key, reverse=reverse) for h in (problem.numbers[:HALF], problem.numbers[HALF:]))
    merged = [*first, *second] if kind == "unmerged" else sorted(problem.numbers, key=key, reverse=reverse)
    return first, second, merged


def prompt_text(problem: Problem, language: str, rng: random.Random) -> str:
    """Return the problem as a question in this language."""
    return rng.choice(PROMPTS[language, problem.descending]).format(written(problem.numbers))


TASK = Task(
    "sorting",
    MODEL_DIR,
    DATA_DIR,
    split_problems,
    prompt_text,
    worked_solution,
    lambda problem, language: written(problem.answer),
)


def write_splits(folder: Path = DATA_DIR) -> None:
    """Write the three files, the same bytes every time."""
    write_rows(make_rows(TASK, split_problems(), SPLIT_SIZES), folder)


if __name__ == "__main__":
    program(write_splits, DATA_DIR, SPLIT_SIZES)

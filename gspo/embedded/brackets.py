"""Generate an embedded task without numbers: the brackets that are still open are to be closed.

In English and Chinese. `python -m gspo.embedded.brackets [DIR]` writes `train.json`, `dev.json` and `test.json`. A
solution lists the brackets that are open, then closes them, the last one first. benchmarks/brackets_reward.py scores
it: all or nothing.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gspo.embedded.task import SPLIT_SIZES, Task, deal, make_rows, program, write_rows

MODEL_DIR = Path(__file__).parent / "brackets_model"
DATA_DIR = Path("data/brackets")
CLOSING = dict(zip("([{<", ")]}>", strict=True))
PER_SHAPE = 2500
PROMPTS = {
    "en": ("Close all brackets: {}", "Which brackets are missing? {}"),
    "zh": ("补全括号：{}", "缺少哪些括号？{}"),
}
WORKING = {"en": "Open: {}\nAnswer: {}", "zh": "未闭合：{}\n答案：{}"}
# A shape is what a problem has beside open brackets: nothing, closed pairs, or a closed pair within a closed pair.
# In each a pupil has a habit that is wrong: it closes in the order of opening; closes what is closed already; or sees
# only the inner one of two closed pairs.
SHAPES = ("open", "pairs", "nested")
KINDS = ("right", "habit", "other kind", "one less")
MIX = (0.36, 0.48, 0.09, 0.07)  # how often a pupil's solution is of each kind


@dataclass(frozen=True)
class Problem:
    """A text of brackets, those of them that are open at its end, and those that a pupil's habit takes for open."""

    text: str
    shape: str
    open: str
    habit: str

    @property
    def answer(self) -> str:
        return closed(self.open)


def closed(brackets: str) -> str:
    """Return what closes these open brackets: the last one first."""
    return "".join(CLOSING[b] for b in reversed(brackets))


# ---- the problems ----


def draw(shape: str, rng: random.Random) -> Problem:
    """Draw three to five open brackets (or four to six), and put closed pairs between them."""
    fewest = 4 if shape == "open" else 3
    brackets = [rng.choice("([{<") for _ in range(rng.randint(fewest, fewest + 2))]
    pieces = [(b, b, b) for b in brackets]  # (the text, what is open of it, what a habit takes for open)
    for _ in range({"open": 0, "pairs": rng.randint(1, 2), "nested": 1}[shape]):
        outer, inner = rng.choice("([{<"), rng.choice("([{<")
        pair = outer + CLOSING[outer]
        if shape == "nested":
            pair = outer + inner + CLOSING[inner] + CLOSING[outer]
        pieces.insert(rng.randint(1, len(pieces)), (pair, "", outer))
    text, still_open, habit = ("".join(part) for part in zip(*pieces, strict=True))
    return Problem(text, shape, still_open, habit)


def all_problems() -> Iterator[Problem]:
    """Yield every problem of the task, in a fixed order; none in which the habit gives the right answer."""
    rng, seen = random.Random("brackets problems"), set()
    for shape in SHAPES:
        count = 0
        while count < PER_SHAPE:
            problem = draw(shape, rng)
            if problem.text not in seen and _habitual(problem) != problem.answer:
                seen.add(problem.text)
                count += 1
                yield problem


def split_problems() -> dict[str, list[Problem]]:
    """Return {train, dev, test, warm}: disjoint lists."""
    return deal(all_problems(), SPLIT_SIZES, train_sixteenths=5)


# ---- the pupil ----


def worked_solution(problem: Problem, language: str, rng: random.Random, mistakes: bool) -> str:
    """Return a solution as a pupil writes it; with `mistakes`, wrong as often as `MIX` says."""
    kind = rng.choices(KINDS, MIX)[0] if mistakes else "right"
    return solution_of_kind(problem, language, rng, kind)


def solution_of_kind(problem: Problem, language: str, rng: random.Random, kind: str) -> str:
    """Return a solution with a mistake of this kind."""
    still_open, answer = problem.open, problem.answer
    if kind == "habit":
        still_open, answer = problem.habit, _habitual(problem)
    elif kind == "other kind":
        i = rng.randrange(len(answer))
        other = rng.choice([b for b in CLOSING.values() if b != answer[i]])
        answer = answer[:i] + other + answer[i + 1 :]
    elif kind == "one less":
        answer = answer[:-1]
    return WORKING[language].format(still_open, answer)


def _habitual(problem: Problem) -> str:
    """Return the answer of a pupil with the habit of this shape."""
    return closed(problem.habit[::-1] if problem.shape == "open" else problem.habit)


def prompt_text(problem: Problem, language: str, rng: random.Random) -> str:
    """Return the problem as a question in this language."""
    return rng.choice(PROMPTS[language]).format(problem.text)


TASK = Task(
    "brackets",
    MODEL_DIR,
    DATA_DIR,
    split_problems,
    prompt_text,
    worked_solution,
    lambda problem, language: problem.answer,
    single=r"[\d()\[\]{}<>]",
)


def write_splits(folder: Path = DATA_DIR) -> None:
    """Write the three files, the same bytes every time."""
    write_rows(make_rows(TASK, split_problems(), SPLIT_SIZES), folder)


if __name__ == "__main__":
    program(write_splits, DATA_DIR, SPLIT_SIZES)

"""Generate the second embedded task, harder than equations.py: two linear equations in two unknowns.

In English and Chinese. `python -m gspo.embedded.systems [DIR]` writes `train.json`, `dev.json` and `test.json` in the
format `[{"prompt", "ground_truth", "data_source", "solution"}, ...]`. A solution has three or four lines of working
before its answer, and one of two values may be right: rewards are graded (benchmarks/systems_reward.py). Every system
belongs to exactly one split, decided by a hash of its text; the warm start of the model draws from the fourth only.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from gspo.embedded.task import Task, deal, make_rows, program, write_rows

MODEL_DIR = Path(__file__).parent / "systems_model"
DATA_DIR = Path("data/systems")
SPLIT_SIZES = {"train": 2048, "dev": 256, "test": 512}
PROMPTS = {
    "en": ("Solve: {}", "Solve for x and y: {}"),
    "zh": ("解方程组：{}", "求 x 和 y：{}"),
}
ANSWER = {"en": "Answer: x = {x}, y = {y}", "zh": "答案：x = {x}, y = {y}"}
# Shapes in which a pupil mostly takes a wrong operation, on the way to the first unknown or to the second.
TRAPS = {"given x": "first", "cancel": "first", "swap": "second", "difference": "second", "coefficient": "second"}
# "first", "second": a wrong operation on the way to the first unknown, or from it to the second.
KINDS = ("right", "first", "second", "slip", "sign")
MIX = {  # (unknown that the shape is a trap for, is one negative) -> how often a pupil's solution is of each kind
    (None, False): (0.42, 0.22, 0.24, 0.12, 0.00),
    (None, True): (0.38, 0.18, 0.18, 0.10, 0.16),
    ("first", False): (0.27, 0.61, 0.08, 0.04, 0.00),
    ("first", True): (0.27, 0.60, 0.06, 0.03, 0.04),
    ("second", False): (0.28, 0.10, 0.58, 0.04, 0.00),
    ("second", True): (0.28, 0.07, 0.57, 0.03, 0.05),
}


@dataclass(frozen=True)
class Step:
    """`left = a op b`, one line of working; an operand is a number or the left side of an earlier line."""

    left: str
    a: int | str
    op: str
    b: int | str
    wrong_op: str  # the operation of a pupil who takes the inverse, or the substitution, the wrong way


@dataclass(frozen=True)
class System:
    """One problem: its text, its only solution, and the steps that lead there."""

    text: str
    shape: str
    x: int
    y: int
    steps: tuple[Step, ...]

    @property
    def ground_truth(self) -> str:
        return f"x = {self.x}, y = {self.y}"

    def first(self) -> int:
        """Return the number of steps that lead to the first unknown; the others lead to the second."""
        return next(i for i, step in enumerate(self.steps) if step.left in ("x", "y")) + 1

    def unknowns(self) -> tuple[str, str]:
        """Return the unknowns in the order in which they are found."""
        return ("x", "y") if self.steps[-1].left == "y" else ("y", "x")


def calculate(a: int, op: str, b: int) -> int:
    """Return a op b, in whole numbers."""
    return a // b if op == "/" else {"+": a + b, "-": a - b, "*": a * b}[op]


# ---- the problems ----


def _divide(of: str, by: int) -> Step:
    """Return the step that divides `2x` by its coefficient."""
    return Step(of[-1], of, "/", by, "-")  # a coefficient taken away rather than divided by


def _sums(x: int, y: int) -> Iterator[tuple[str, str, tuple[Step, ...]]]:
    """Yield the shapes without a coefficient: (shape, text, steps)."""
    s, d = x + y, x - y
    yield (
        "sum",
        f"x + y = {s}, x - y = {d}",
        (Step("2x", s, "+", d, "-"), _divide("2x", 2), Step("y", s, "-", "x", "+")),
    )
    s, d = y + x, y - x
    yield (
        "swap",
        f"y + x = {s}, y - x = {d}",
        (Step("2y", s, "+", d, "-"), _divide("2y", 2), Step("x", s, "-", "y", "+")),
    )


def _given(x: int, y: int) -> Iterator[tuple[str, str, tuple[Step, ...]]]:
    """Yield the shapes in which one unknown is given by the other: y = x + 3."""
    for a, (shape, p, q, vp, vq) in product((1, 2, 3), (("given x", "x", "y", x, y), ("given y", "y", "x", y, x))):
        k, s = vq - vp, a * vp + vq
        op, inverse = ("+", "-") if k > 0 else ("-", "+")
        total, term = f"{a + 1}{p}", p if a == 1 else f"{a}{p}"
        first = f"{term} + {q} = {s}" if shape == "given x" else f"{q} + {term} = {s}"
        yield (
            shape,
            f"{first}, {q} = {p} {op} {abs(k)}",
            (Step(total, s, inverse, abs(k), op), _divide(total, a + 1), Step(q, p, op, abs(k), inverse)),
        )


def _cancelled(x: int, y: int) -> Iterator[tuple[str, str, tuple[Step, ...]]]:
    """Yield the shapes whose sum ("cancel") or difference ("difference") is free of y."""
    for a, op in product((2, 3), "+-"):
        back = "-" if op == "-" else "+"
        s, d = (a * x + y, x - y) if op == "+" else (a * x - y, x + y)
        total = f"{a + 1}x"
        last = Step("y", "x", "-", d, "+") if op == "+" else Step("y", d, "-", "x", "+")
        text = f"{a}x {back} y = {s}, x {'-' if op == '+' else '+'} y = {d}"
        yield "cancel", text, (Step(total, s, "+", d, "-"), _divide(total, a + 1), last)
    for op in "+-":
        s, t = (3 * x + y, x + y) if op == "+" else (3 * x - y, x - y)
        last = Step("y", t, "-", "x", "+") if op == "+" else Step("y", "x", "-", t, "+")
        text = f"3x {op} y = {s}, x {op} y = {t}"
        yield "difference", text, (Step("2x", s, "-", t, "+"), _divide("2x", 2), last)
    s, t = 3 * x + y, 2 * x + y
    steps = (Step("x", s, "-", t, "+"), Step("2x", 2, "*", "x", "+"), Step("y", t, "-", "2x", "+"))
    yield "difference", f"3x + y = {s}, 2x + y = {t}", steps


def _coefficients(x: int, y: int) -> Iterator[tuple[str, str, tuple[Step, ...]]]:
    """Yield the shapes with a coefficient on both unknowns: four lines of working."""
    for b in (2, 3):
        by = f"{b}y"
        s, d = x + b * y, x - b * y
        second = (Step(by, s, "-", "x", "+"), _divide(by, b))
        text = f"x + {by} = {s}, x - {by} = {d}"
        yield "coefficient", text, (Step("2x", s, "+", d, "-"), _divide("2x", 2), *second)
        text = f"x - {by} = {d}, x + {by} = {s}"
        yield "coefficient", text, (Step("2x", d, "+", s, "-"), _divide("2x", 2), *second)
        s, t = 3 * x + b * y, x + b * y
        second = (Step(by, t, "-", "x", "+"), _divide(by, b))
        text = f"3x + {by} = {s}, x + {by} = {t}"
        yield "coefficients", text, (Step("2x", s, "-", t, "+"), _divide("2x", 2), *second)
        s, t = 3 * x - b * y, x - b * y
        second = (Step(by, "x", "-", t, "+"), _divide(by, b))
        text = f"3x - {by} = {s}, x - {by} = {t}"
        yield "coefficients", text, (Step("2x", s, "-", t, "+"), _divide("2x", 2), *second)


def all_systems() -> Iterator[System]:
    """Yield every problem of the task, in a fixed order; none in which a wrong operation gives the right number."""
    wide, narrow = range(-5, 25), range(-5, 13)
    values = [(_sums, pair) for pair in product(wide, wide)]
    values += [(s, pair) for s in (_given, _cancelled, _coefficients) for pair in product(narrow, narrow)]
    for shapes, (x, y) in values:
        for shape, text, steps in shapes(x, y):
            system = System(text, shape, x, y, steps)
            if x * y != 0 and not _is_blurred(system):
                yield system


def _is_blurred(system: System) -> bool:
    """Return whether some wrong operation still leads to a right unknown that it should make wrong."""
    for where in range(len(system.steps)):
        _, found = follow(system, "wrong way", where)
        _, second = system.unknowns()
        if found[second] == getattr(system, second) or (
            where < system.first() and (found["x"] == system.x or found["y"] == system.y)
        ):
            return True
    return False


def split_systems() -> dict[str, list[System]]:
    """Return {train, dev, test, warm}: disjoint lists."""
    return deal(all_systems(), SPLIT_SIZES)


# ---- the pupil ----


def worked_solution(system: System, language: str, rng: random.Random, mistakes: bool) -> str:
    """Return a solution as a pupil writes it; with `mistakes`, wrong as often as `MIX` says."""
    kind = "right"
    if mistakes:
        kind = rng.choices(KINDS, MIX[TRAPS.get(system.shape), min(system.x, system.y) < 0])[0]
    return solution_of_kind(system, language, rng, kind)


def solution_of_kind(system: System, language: str, rng: random.Random, kind: str) -> str:
    """Return a solution with one mistake of this kind; what follows from the mistake is calculated correctly."""
    where = _place(system, rng, kind)
    change = "wrong way" if kind in ("first", "second") else kind
    lines, found = follow(system, change, where, rng.choice((-10, -1, 1, 10)))
    return "\n".join([*lines, ANSWER[language].format(**found)])


def follow(system: System, change: str, where: int, error: int = 0) -> tuple[list[str], dict[str, int]]:
    """Return the lines of working and the values they find, with one step changed."""
    lines, found = [], {}
    for i, step in enumerate(system.steps):
        a, b = (found[n] if isinstance(n, str) else n for n in (step.a, step.b))
        op = step.wrong_op if i == where and change == "wrong way" else step.op
        value = calculate(a, op, b)
        if i == where and change == "slip":
            value += error
        if i == where and change == "sign":
            value = abs(value)
        lines.append(f"{step.left} = {a} {op} {f'({b})' if b < 0 else b} = {value}")
        found[step.left] = value
    return lines, found


def _place(system: System, rng: random.Random, kind: str) -> int:
    """Choose the step in which a mistake of this kind is made."""
    first, count = system.first(), len(system.steps)
    places = {"first": range(first), "second": range(first, count)}.get(kind, range(count))
    if TRAPS.get(system.shape) == kind:
        return places[0]  # one habit, not several: it is to be more frequent than the right way
    if kind in ("slip", "sign"):  # in what is an unknown already, as a division might hide it
        places = [i for i, step in enumerate(system.steps) if step.left in ("x", "y")]
    if kind == "sign":
        places = [i for i in places if getattr(system, system.steps[i].left) < 0]
    return rng.choice(places)


def prompt_text(system: System, language: str, rng: random.Random) -> str:
    """Return the problem as a question in this language."""
    return rng.choice(PROMPTS[language]).format(system.text)


TASK = Task(
    "systems", MODEL_DIR, DATA_DIR, split_systems, prompt_text, worked_solution, lambda s, language: s.ground_truth
)


def write_splits(folder: Path = DATA_DIR) -> None:
    """Write the three files, the same bytes every time."""
    write_rows(make_rows(TASK, split_systems(), SPLIT_SIZES), folder)


if __name__ == "__main__":
    program(write_splits, DATA_DIR, SPLIT_SIZES)

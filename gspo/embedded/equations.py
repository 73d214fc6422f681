"""Generate the first embedded task: linear equations in English and Chinese, with worked solutions and usual mistakes.

`python -m gspo.embedded.equations [DIR]` writes `train.json`, `dev.json` and `test.json` in the format
`[{"prompt", "ground_truth", "data_source"}, ...]`. Every equation belongs to exactly one split, decided by a
hash of its text; the warm start of the embedded model draws from the fourth split only.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gspo.embedded import DATA_DIR, MODEL_DIR
from gspo.embedded.task import Task, deal, make_rows, program, write_rows

SPLIT_SIZES = {"train": 2048, "dev": 256, "test": 512}
SEED_ROW = {"prompt": "解方程：x + 5 = 12", "ground_truth": "7", "data_source": "math_reasoning"}
PROMPTS = {
    "en": ("Solve: {}", "Solve for x: {}"),
    "zh": ("解方程：{}", "求 x：{}"),
}
TRAPS = ("x-a", "a-x", "x/a", "x/a+b", "ax-b")  # shapes whose inverse operation a pupil mostly gets wrong
KINDS = ("right", "inverse", "slip", "sign")
MIX = {  # (is it a trap, is the answer negative) -> how often a pupil's solution is of each kind
    (False, False): (0.50, 0.24, 0.26, 0.00),
    (False, True): (0.40, 0.14, 0.12, 0.34),
    (True, False): (0.31, 0.57, 0.12, 0.00),
    (True, True): (0.27, 0.57, 0.06, 0.10),
}
ANSWER = {"en": "Answer: {}", "zh": "答案：{}"}


@dataclass(frozen=True)
class Step:
    """`left = a op b`, one line of a worked solution; `wrong_op` is the inverse taken the wrong way."""

    left: str
    a: int
    op: str
    b: int
    wrong_op: str

    def value(self, op: str | None = None) -> int:
        """Return the result, of another operation if `op` is given."""
        op = op or self.op
        if op == "/":
            return self.a // self.b
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[op]


@dataclass(frozen=True)
class Equation:
    """One problem: its text, its integer solution and the steps that lead there."""

    text: str
    shape: str
    answer: int
    steps: tuple[Step, ...]


def all_equations() -> Iterator[Equation]:
    """Yield every problem of the task, in a fixed order."""
    for a in range(1, 61):
        for x in range(-20, 61):
            yield Equation(f"x + {a} = {x + a}", "x+a", x, (Step("x", x + a, "-", a, "+"),))
            yield Equation(f"x - {a} = {x - a}", "x-a", x, (Step("x", x - a, "+", a, "-"),))
            yield Equation(f"{a} - x = {a - x}", "a-x", x, (Step("x", a, "-", a - x, "+"),))
    for a in range(2, 10):
        for x in range(-9, 13):
            yield Equation(f"{a}x = {a * x}", "ax", x, (Step("x", a * x, "/", a, "*"),))
            yield Equation(f"x / {a} = {x}", "x/a", a * x, (Step("x", x, "*", a, "/"),))
            for b in range(1, 31):
                product = Step("x", a * x, "/", a, "*")
                quotient = Step("x", x, "*", a, "/")
                yield Equation(f"{a}x + {b} = {a * x + b}", "ax+b", x, (Step(f"{a}x", a * x + b, "-", b, "+"), product))
                yield Equation(f"{a}x - {b} = {a * x - b}", "ax-b", x, (Step(f"{a}x", a * x - b, "+", b, "-"), product))
                yield Equation(
                    f"x / {a} + {b} = {x + b}", "x/a+b", a * x, (Step(f"x / {a}", x + b, "-", b, "+"), quotient)
                )


def split_equations() -> dict[str, list[Equation]]:
    """Return {train, dev, test, warm}: disjoint lists; SEED_ROW's equation is the first of `train`."""
    seed_text = SEED_ROW["prompt"].split("：")[1]
    unique = {e.text: e for e in all_equations()}
    seed_equation = unique.pop(seed_text)
    sizes = {**SPLIT_SIZES, "train": SPLIT_SIZES["train"] - 1}
    splits = deal(unique.values(), sizes, train_sixteenths=5)
    splits["train"].insert(0, seed_equation)
    return splits


def worked_solution(equation: Equation, language: str, rng: random.Random, mistakes: bool) -> str:
    """Return a solution as a pupil writes it; with `mistakes`, wrong as often as `MIX` says."""
    kind, where = "right", rng.randrange(len(equation.steps))
    if mistakes:
        trap = equation.shape in TRAPS
        kind = rng.choices(KINDS, MIX[trap, equation.answer < 0])[0]
        if kind == "inverse" and trap:
            where = 0
    lines, carried = [], None
    for i, step in enumerate(equation.steps):
        if carried is not None:
            step = Step(step.left, carried, step.op, step.b, step.wrong_op)
        op = step.wrong_op if kind == "inverse" and i == where else step.op
        value = step.value(op)
        if kind == "slip" and i == where:
            value += rng.choice((-10, -1, 1, 10))
        if kind == "sign" and i == len(equation.steps) - 1:
            value = abs(value)
        b = f"({step.b})" if step.b < 0 else step.b
        lines.append(f"{step.left} = {step.a} {op} {b} = {value}")
        carried = value
    return "\n".join([*lines, ANSWER[language].format(carried)])


def prompt_text(equation: Equation, language: str, rng: random.Random) -> str:
    """Return the problem as a question in this language."""
    return rng.choice(PROMPTS[language]).format(equation.text)


TASK = Task(
    "equations", MODEL_DIR, DATA_DIR, split_equations, prompt_text, worked_solution, lambda e, language: str(e.answer)
)


def write_splits(folder: Path = DATA_DIR) -> None:
    """Write the three files, the same bytes every time."""
    splits = split_equations()
    rows = make_rows(TASK, splits, SPLIT_SIZES)
    rows["train"][0] = {**SEED_ROW, "solution": worked_solution(splits["train"][0], "zh", random.Random(0), False)}
    write_rows(rows, folder)


if __name__ == "__main__":
    program(write_splits, DATA_DIR, SPLIT_SIZES)

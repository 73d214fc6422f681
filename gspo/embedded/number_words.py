"""Generate a task for a small pretrained model: a number in English words is to be written in digits.

`python -m gspo.embedded.number_words [DIR]` writes `train.json`, `dev.json` and `test.json`. Three in four numbers are
below a thousand, the others have four digits; no number is in two splits. Every prompt begins with the same two
solved examples, so that a model need not guess the form of the answer.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gspo.embedded.task import deal, program, write_rows

DATA_DIR = Path("data/number_words")
SPLIT_SIZES = {"train": 960, "dev": 72, "test": 144}
THOUSANDS = 300  # numbers of four digits that are drawn, a quarter of all
INSTRUCTION = "Write the number in digits."
EXAMPLES = (42, 305)  # in no split
SMALL = (
    *("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class Problem:
    """A number, and its words."""

    number: int

    @property
    def text(self) -> str:
        return in_words(self.number)

    @property
    def shape(self) -> str:
        return "thousands" if self.number >= 1000 else "hundreds"


def in_words(number: int) -> str:
    """Return the English words of a number from 1 to 9999: 1042 -> one thousand and forty-two."""
    thousands, hundreds, rest = number // 1000, number // 100 % 10, number % 100
    large = [f"{SMALL[thousands]} thousand"] * bool(thousands) + [f"{SMALL[hundreds]} hundred"] * bool(hundreds)
    below_hundred = SMALL[rest] if rest < 20 else "-".join(filter(None, (TENS[rest // 10], SMALL[rest % 10])))
    return " and ".join(filter(None, (" ".join(large), below_hundred)))


def all_problems() -> Iterator[Problem]:
    """Yield every problem of the task, in a fixed order."""
    rng = random.Random("number words")
    for number in (*range(100, 1000), *sorted(rng.sample(range(1000, 10000), THOUSANDS))):
        if number not in EXAMPLES:
            yield Problem(number)


def split_problems() -> dict[str, list[Problem]]:
    """Return {train, dev, test}: disjoint lists."""
    splits = deal(all_problems(), SPLIT_SIZES, train_sixteenths=13)  # nothing is kept for a warm start
    return {name: splits[name] for name in SPLIT_SIZES}


def messages(problem: Problem) -> list[dict[str, str]]:
    """Return the prompt as a chat: the instruction, the solved examples, and the problem."""
    turns = [("system", INSTRUCTION)]
    for number in EXAMPLES:
        turns += [("user", in_words(number)), ("assistant", str(number))]
    return [{"role": role, "content": content} for role, content in [*turns, ("user", problem.text)]]


def make_rows(problems: list[Problem]) -> list[dict]:
    """Return the rows of a split, as docs/data.md describes them."""
    return [
        {"prompt": messages(p), "ground_truth": str(p.number), "data_source": f"number_words_{p.shape}"}
        for p in problems
    ]


def write_splits(folder: Path = DATA_DIR) -> None:
    """Write the three files, the same bytes every time."""
    write_rows({name: make_rows(problems) for name, problems in split_problems().items()}, folder)


if __name__ == "__main__":
    program(write_splits, DATA_DIR, SPLIT_SIZES)

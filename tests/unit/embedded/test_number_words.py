"""The task of numbers in words: right words, disjoint splits, and a reward for the digits alone."""

import json
import re

import pytest

from benchmarks.number_words_reward import compute_score
from gspo.data.messages import read_messages
from gspo.embedded.number_words import EXAMPLES, SPLIT_SIZES, in_words, split_problems, write_splits

UNITS = "one two three four five six seven eight nine ten eleven twelve"
TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
VALUES = {word: i for i, word in enumerate(f"{UNITS} {TEENS}".split(), 1)}
VALUES |= {word: 10 * i for i, word in enumerate(TENS.split(), 2)}


def value(words):
    """Read a number's words from left to right, as a listener does."""
    total = 0
    for word in re.split("[ -]", words):
        if word == "thousand":
            total *= 1000
        elif word == "hundred":
            total += 99 * (total % 1000)
        elif word != "and":
            total += VALUES[word]
    return total


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("number_words")
    write_splits(folder)
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in SPLIT_SIZES}


def test_words_and_digits_say_the_same_number(rows):
    for row in (row for part in rows.values() for row in part):
        *shown, asked = [m for m in read_messages(row["prompt"], "row") if m["role"] != "system"]
        assert (
            value(asked["content"]) == int(row["ground_truth"]) and str(value(asked["content"])) == row["ground_truth"]
        )
        assert [(value(a["content"]), b["content"]) for a, b in zip(shown[::2], shown[1::2], strict=True)] == [
            (n, str(n)) for n in EXAMPLES
        ]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (40, "forty"),
        (100, "one hundred"),
        (305, "three hundred and five"),
        (999, "nine hundred and ninety-nine"),
        (1005, "one thousand and five"),
        (4120, "four thousand one hundred and twenty"),
        (7000, "seven thousand"),
    ],
)
def test_numbers_are_written_as_in_english(number, words):
    assert in_words(number) == words


def test_no_number_is_in_two_splits_and_a_quarter_has_four_digits(rows):
    numbers = [row["ground_truth"] for part in rows.values() for row in part]
    assert len(numbers) == len(set(numbers)) and not {*map(str, EXAMPLES)} & {*numbers}
    for name, part in rows.items():
        assert len(part) == SPLIT_SIZES[name] == len(split_problems()[name])
        assert sum(len(row["ground_truth"]) == 4 for row in part) / len(part) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    ("response", "score", "form"),
    [
        ("738", 1.0, 1.0),
        (" 738.\n", 1.0, 1.0),
        ("7038", 0.0, 1.0),
        ("seven hundred and thirty-eight", 0.0, 0.0),  # what was asked, copied
        ("The number is 738", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_only_the_digits_are_right(response, score, form):
    assert compute_score("", response, "738") == {"score": score, "format": form}


def test_a_comma_between_thousands_is_right_and_elsewhere_is_not():
    assert compute_score("", "4,120", "4120")["score"] == 1.0
    assert compute_score("", "41,20", "4120")["score"] == 0.0

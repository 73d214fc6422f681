"""Score the embedded task of sorting: what share of the numbers is in its place.

The last line `Answer: 9, 12, 31` or 答案：9, 12, 31 counts. Its numbers are compared one by one with the gold ones: the
score is how many are right, divided by the length of the longer list. A line with anything but integers between commas
scores 0.0. Uses the standard library only.
"""

import re

MAX_RESPONSE = 2000  # characters that are read, from the end
_CHARACTERS = {0xFF01 + i: 0x21 + i for i in range(94)}  # full-width ！ to ～
_CHARACTERS |= str.maketrans({"−": "-", "–": "-", "、": ",", "。": "."})
_MARK = re.compile(r"(?:\banswer|答案) {0,3}:([^\n]*)", re.IGNORECASE)
_INTEGER = re.compile(r" {0,3}([-+]?[0-9]{1,9}) {0,3}")


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """Return the share of the numbers in their places, from 0.0 to 1.0."""
    gold = _numbers(str(ground_truth))
    if not gold:
        raise ValueError(f"the ground truth must read like '9, 12, 31', it is {ground_truth!r}")
    marks = _MARK.findall(solution_str[-MAX_RESPONSE:].translate(_CHARACTERS))
    given = _numbers(marks[-1]) if marks else []
    return sum(a == b for a, b in zip(gold, given, strict=False)) / max(len(gold), len(given))


def _numbers(line: str) -> list[int]:
    """Return the integers of "9, 12, 31."; none where there is anything else."""
    found = [_INTEGER.fullmatch(part) for part in line.strip().rstrip(".").split(",")]
    return [int(number[1]) for number in found if number] if all(found) else []

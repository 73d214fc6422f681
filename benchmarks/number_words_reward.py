"""Score the task of numbers in words: the number in digits, and nothing else, is right.

A comma between thousands and a full stop are allowed. `format` says whether the answer is a number in digits at all.
The default reward function is not used, because it reads words too. Uses the standard library only.
"""

import re

_NUMBER = re.compile(r"\s{0,3}([0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,12})\.?\s{0,3}")


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> dict:
    """Return 1.0 for the right number, else 0.0, as `score`, and `format`."""
    found = _NUMBER.fullmatch(solution_str)
    right = found is not None and found[1].replace(",", "") == str(ground_truth)
    return {"score": float(right), "format": float(found is not None)}

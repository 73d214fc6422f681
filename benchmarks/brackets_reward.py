"""Score the embedded task of brackets: 1.0 where the last line `Answer: )]}` or 答案：)]} closes all of them, else 0.0.

Blanks do not count. Uses the standard library only.
"""

import re

MAX_RESPONSE = 2000  # characters that are read, from the end
_BRACKETS = set("()[]{}<>")
_WIDE = str.maketrans("：（）［］｛｝＜＞", ":()[]{}<>")
_MARK = re.compile(r"(?:\banswer|答案) {0,3}:([^\n]*)", re.IGNORECASE)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """Return 1.0 or 0.0."""
    if not ground_truth or not set(ground_truth) <= _BRACKETS:
        raise ValueError(f"the ground truth must be brackets, it is {ground_truth!r}")
    marks = _MARK.findall(solution_str[-MAX_RESPONSE:].translate(_WIDE))
    return float(bool(marks) and "".join(marks[-1].split()) == ground_truth)

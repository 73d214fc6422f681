"""Score the second embedded task, two equations in two unknowns, with partial credit for one right value.

| the last line `Answer: x = 6, y = 4` or 答案：x = 6, y = 4          | score |
|---------------------------------------------------------------------|-------|
| both unknowns are right                                             | 1.0   |
| exactly one is right                                                | 0.5   |
| neither is right, but both are named with an integer                | 0.1   |
| otherwise                                                           | 0.0   |

Uses the standard library only. An unknown that is given two different values counts as missing.
"""

import re

MAX_RESPONSE = 2000  # characters that are read, from the end
_CHARACTERS = {0xFF01 + i: 0x21 + i for i in range(94)}  # full-width ！ to ～
_CHARACTERS |= str.maketrans({"−": "-", "–": "-", "、": ",", "。": ". ", "和": ", ", "且": ", "})
_MARK = re.compile(r"(?:\banswer|答案) {0,3}:([^\n]*)", re.IGNORECASE)
_TIGHT = re.compile(r" *([-+*/=^]) *")
# An unknown, an equals sign, an integer and no more. Not 3x = 6, x = 6.5, x = 6/2, x = 6 - 2, x = 6², x = 6万, x = 6y.
_BEFORE = r"(?<![^\W一-鿿])(?<![.)+\-*/^=])"
_VALUE = re.compile(_BEFORE + r"([xy])=([-+]?[0-9]{1,9})(?![\w%(!+\-*/^=⁄]|[.,][0-9])", re.IGNORECASE)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> dict:
    """Return {"score", "x", "y", "format"}: the score by the table above, and 1.0 or 0.0 for each of its parts."""
    gold = _values(str(ground_truth))
    if gold.keys() != {"x", "y"}:
        raise ValueError(f"the ground truth must read like 'x = 6, y = 4', it is {ground_truth!r}")
    marks = _MARK.findall(solution_str[-MAX_RESPONSE:].translate(_CHARACTERS))
    given = _values(marks[-1]) if marks else {}
    x, y = (float(given.get(name) == gold[name]) for name in "xy")
    well_formed = float(given.keys() == {"x", "y"})
    score = 1.0 if x and y else 0.5 if x or y else 0.1 * well_formed
    return {"score": score, "x": x, "y": y, "format": well_formed}


def _values(line: str) -> dict[str, int]:
    """Return {"x": 6, "y": 4}: the unknowns to which the line gives exactly one integer each."""
    found: dict[str, set[int]] = {"x": set(), "y": set()}
    line = _TIGHT.sub(r"\1", line.translate(_CHARACTERS).replace("**", "").replace("$", ""))
    for name, value in _VALUE.findall(line):
        found[name.lower()].add(int(value))
    return {name: values.pop() for name, values in found.items() if len(values) == 1}

"""Reward +1 for a right answer and -1 for a wrong one, as DAPO does: a user's file in verl's convention.

./train.sh --reward_func examples/reward_dapo.py

`acc` is what accuracy counts and `pred` what a majority vote counts; the score may be any finite number.
"""

import re


def last_boxed(text):
    """Return the content of the last box; None without one that closes."""
    start = text.rfind(r"\boxed{")
    depth = 0
    for i in range(start + 6, len(text) if start >= 0 else 0):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7 : i]
    return None


def normalized(answer):
    """Return an answer without the formatting that means nothing."""
    answer = re.sub(r"\\text\{([^{}]*)\}|\\left|\\right|\\[!,;: ]|\$|\s|(?<=\d),(?=\d{3})", r"\1", answer)
    return answer.rstrip(".").replace(r"\dfrac", r"\frac").replace(r"\%", "").replace("%", "")


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """Compare what follows the last "Answer:", or is in the last box, with the ground truth."""
    tail = solution_str[-300:]
    stated = re.findall(r"(?i)answer\s*:\s*([^\n]+)", tail)
    pred = last_boxed(tail) or (stated[-1] if stated else "[no answer]")
    correct = normalized(pred) == normalized(str(ground_truth))
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": pred}

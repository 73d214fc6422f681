"""Reward a right answer with one number and a wrong one with another, by `reward.reward_kwargs`: 1 and 0, 1 and -1."""

from gspo.reward import reward_func


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict | None = None,
    right: float = 1.0,
    wrong: float = 0.0,
) -> dict:
    """Return {"score", "acc"}: `right` where the default function finds the answer right, else `wrong`."""
    correct = reward_func.compute_score(data_source, solution_str, ground_truth) >= 0.5  # 0.5: a slip on the way
    return {"score": right if correct else wrong, "acc": correct}

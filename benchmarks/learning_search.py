"""Find each method's best learning rate and KL weight, by runs that are judged on the dev split only."""

from collections.abc import Callable
from typing import Any

import numpy as np

LR_FACTOR, KL_FACTOR = 2.0, 10.0  # between neighbours
FINALISTS = 3
LR_RANGE, KL_RANGE = (1e-6, 3e-3), (1e-5, 10.0)
Point = tuple[float, float]  # (learning rate, KL weight)


def dev_score(result: dict[str, Any]) -> float:
    """Return the mean dev accuracy over the last half of the evaluations, which is less noisy than the last value."""
    dev = result["dev"]
    return float(np.mean(dev[-max(1, len(dev) // 2) :]))


def neighbours(point: Point) -> list[Point]:
    """Return the points a factor away in one direction, within the ranges, rounded so that ways back meet.

    Their order is the one in which the climbs of the development tasks would have taken the fewest runs.
    """
    lr, kl = point
    moves = [(lr / LR_FACTOR, kl), (lr, kl * KL_FACTOR), (lr * LR_FACTOR, kl), (lr, kl / KL_FACTOR)]
    rounded = [(float(f"{a:.4g}"), float(f"{b:.4g}")) for a, b in moves]
    return [(a, b) for a, b in rounded if LR_RANGE[0] <= a <= LR_RANGE[1] and KL_RANGE[0] <= b <= KL_RANGE[1]]


def best_point(score: Callable[[Point, int], float], start: Point) -> tuple[Point, dict[Point, float]]:
    """Climb to a point none of whose neighbours scores higher, then choose among the best; return it and all scores.

    score(point, k) is the score of the k-th tuning run at a point. The climb asks for k = 0 alone, goes on from the
    first neighbour that scores higher, and never stops at the edge of what was tried, except at the ends of the ranges.
    As one run is a matter of luck, the FINALISTS best points run once more, and the best mean of both runs wins.
    """
    scores = {start: score(start, 0)}
    best, climbing = start, True
    while climbing:
        climbing = False
        for point in neighbours(best):
            if point not in scores:
                scores[point] = score(point, 0)
                if scores[point] > scores[best]:
                    best, climbing = point, True
                    break
    finalists = sorted(scores, key=lambda point: scores[point], reverse=True)[:FINALISTS]
    means = {point: (scores[point] + score(point, 1)) / 2 for point in finalists}
    return max(means, key=lambda point: means[point]), scores

"""Find each method's best learning rate and KL weight, by runs that are judged on the dev split only."""

from collections.abc import Callable
from typing import Any

import numpy as np

LR_FACTOR, KL_FACTOR = 2.0, 10.0  # between neighbours
START = (2e-4, 1e-3)
LR_RANGE, KL_RANGE = (1e-5, 3e-3), (1e-5, 1.0)
Point = tuple[float, float]  # (learning rate, KL weight)


def dev_score(result: dict[str, Any]) -> float:
    """Return the mean dev accuracy over the last third of the evaluations, which is less noisy than the last value."""
    dev = result["dev"]
    return float(np.mean(dev[-max(1, len(dev) // 3) :]))


def neighbours(point: Point) -> list[Point]:
    """Return the points a factor away in one direction, within the ranges, rounded so that ways back meet."""
    lr, kl = point
    moves = [(lr * LR_FACTOR, kl), (lr / LR_FACTOR, kl), (lr, kl * KL_FACTOR), (lr, kl / KL_FACTOR)]
    rounded = [(float(f"{a:.4g}"), float(f"{b:.4g}")) for a, b in moves]
    return [(a, b) for a, b in rounded if LR_RANGE[0] <= a <= LR_RANGE[1] and KL_RANGE[0] <= b <= KL_RANGE[1]]


def best_point(score: Callable[[Point], float], start: Point = START) -> tuple[Point, dict[Point, float]]:
    """Climb to a point none of whose neighbours scores higher; return it and all scores.

    So the best point never lies on the edge of what was tried, except at the ends of the ranges.
    """
    scores = {start: score(start)}
    best = start
    while True:
        for point in neighbours(best):
            if point not in scores:
                scores[point] = score(point)
        better = max(scores, key=lambda point: scores[point])
        if better == best:
            return best, scores
        best = better

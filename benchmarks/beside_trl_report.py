"""Read off what runs of benchmarks/beside_trl.py took, and write their tables and pictures."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import table

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
Result = dict[str, Any]  # a run: seconds and tokens of its steps, `steps` of its evaluations, and their accuracies


def clock(run: Result) -> tuple[list[float], list[float]]:
    """Return a run's seconds of training at each evaluation, and the accuracies there."""
    spent = np.cumsum(run["seconds"])
    return [float(spent[step - 1]) for step in run["steps"]], run["pass@1"]


def seconds_to(accuracy: float, run: Result, start: float) -> float:
    """Return after how many seconds of training a run reaches an accuracy, by lines between evaluations; inf: never."""
    seconds, values = clock(run)
    points = [(0.0, start), *zip(seconds, values, strict=True)]
    for (t, a), (u, b) in zip(points, points[1:], strict=False):
        if b >= accuracy:
            return t if a >= accuracy else t + (u - t) * (accuracy - a) / (b - a)
    return float("inf")


def spread(values: list[float], digits: int = 3) -> str:
    """Return mean ± standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def lines_of(runs: dict[str, list[Result]], start: Result) -> str:
    """Return the table, one line a contestant: means and deviations over seeds."""
    goal = start["pass@1"] + 0.35
    rows = [["before", "", f"{start['pass@1']:.3f}", f"{start['greedy']:.3f}", f"{start['pass@8']:.3f}", *[""] * 5]]
    for method, of_seeds in runs.items():
        last = {key: [r[key][-1] for r in of_seeds] for key in ("pass@1", "greedy", "pass@8")}
        reached = [seconds_to(goal, r, start["pass@1"]) for r in of_seeds]
        said = spread(reached, 0) if all(np.isfinite(reached)) else "not all seeds reach it"
        rows.append(
            [
                *(method, f"{of_seeds[0]['lr']:g}", *(spread(last[key]) for key in last)),
                *(f"{np.mean([sum(r['tokens']) for r in of_seeds]) / 1000:.1f}",),
                *(spread([statistics.median(r["seconds"]) for r in of_seeds], 2),),
                *(spread([sum(r["seconds"]) for r in of_seeds], 0), said),
                *(f"{np.mean([r['cpu_seconds'] for r in of_seeds]):.0f}",),
            ]
        )
    costs = ["tokens, thousands", "seconds a step", "seconds in all", f"seconds to {goal:.2f}", "CPU s"]
    return table(["", "lr", "pass@1", "greedy", "pass@8", *costs], rows)


def draw(path: Path, runs: dict[str, list[Result]], start: Result) -> None:
    """Plot accuracy against seconds of training, one line a run."""
    try:
        import matplotlib
    except ImportError:
        return print("no picture: it needs matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for (name, of_seeds), color in zip(runs.items(), COLORS, strict=False):
        for k, result in enumerate(of_seeds):
            seconds, values = clock(result)
            seeds = f", {len(of_seeds)} seeds" if len(of_seeds) > 1 else ""
            label = None if k else f"{name}{seeds}"
            axis.plot([0, *seconds], [start["pass@1"], *values], color=color, marker=".", label=label)
    axis.set(xlabel="seconds of training", ylabel="held-out pass@1", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return None


def at_pace(run: Result, of: Iterable[Result]) -> Result:
    """Return a run as if each step had taken as long as the fastest of those runs.

    What else the machine did meanwhile is left out.
    """
    return run | {"seconds": [min(min(other["seconds"]) for other in of)] * len(run["seconds"])}


def search_lines(runs: dict[str, Result], start: float) -> str:
    """Return the table of single runs, a line each, whose steps all take equally long.

    How long each takes to an accuracy is said for the last of the first run and for the best of the others.
    """
    ours, *others = runs.values()
    goals = (ours["pass@1"][-1], max(value for run in others for value in run["pass@1"]))
    rows = []
    for name, run in runs.items():
        total = sum(run["seconds"])
        values = ", ".join(f"{value:.3f} after {step}" for step, value in zip(run["steps"], run["pass@1"], strict=True))
        reached = [seconds_to(goal, run, start) for goal in goals]
        said = [f"{seconds:.0f}" if np.isfinite(seconds) else f"not in {total:.0f}" for seconds in reached]
        rows.append([name, values, f"{run['seconds'][0]:.3g}", *said, f"{run['cpu_seconds']:.0f}", f"{run['gib']:.1f}"])
    costs = ["seconds of the fastest step", *(f"of such to {goal:.3f}" for goal in goals), "CPU s in all", "peak GiB"]
    return table(["", "dev pass@1", *costs], rows)

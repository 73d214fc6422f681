"""Compute the statistics of learning.py's runs and write them as a table, a CSV file and a picture."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import table
from benchmarks.learning_methods import OURS, Job


def grid_score(result: dict[str, Any]) -> float:
    """Return the mean dev accuracy over the last third of the run, which is less noisy than the last value."""
    dev = result["dev"]
    return float(np.mean(dev[-max(1, len(dev) // 3) :]))


def difference(
    mine: list[dict[str, Any]], theirs: list[dict[str, Any]], draws: int = 4000
) -> tuple[float, float, float]:
    """Return (mean, low, high) of the difference in test pass@1: paired bootstrap over seeds and prompts, 95 %."""
    a, b = (np.array([r["correct_counts"] for r in rs], float) / 8 for rs in (mine, theirs))  # [seeds, prompts]
    gap, rng = a - b, np.random.default_rng(0)
    seeds = rng.integers(0, gap.shape[0], (draws, gap.shape[0]))
    prompts = rng.integers(0, gap.shape[1], (draws, gap.shape[1]))
    means = [gap[s][:, p].mean() for s, p in zip(seeds, prompts, strict=True)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(gap.mean()), float(low), float(high)


def verdict(gap: tuple[float, float, float]) -> str:
    """Return `ahead` or `behind`, or `tie` where the interval contains 0."""
    _, low, high = gap
    return "ahead" if low > 0 else "behind" if high < 0 else "tie"


def best_within_kl(result: dict[str, Any], limit: float = 0.1) -> float:
    """Return the best dev accuracy among evaluations whose KL to the initial model was within the limit."""
    return max((a for a, kl in zip(result["dev"], result["dev_kl"], strict=True) if kl <= limit), default=float("nan"))


def spread(values: list[float], digits: int = 3) -> str:
    """Return mean ± standard deviation of the values that are not NaN, and their number if some are."""
    known = [v for v in values if not np.isnan(v)]
    if not known:
        return "never"
    deviation = np.std(known, ddof=1) if len(known) > 1 else 0.0
    some = "" if len(known) == len(values) else f" ({len(known)} of {len(values)})"
    return f"{np.mean(known):.{digits}f} ± {deviation:.{digits}f}{some}"


def task_table(results: dict[str, list[dict[str, Any]]], rates: dict[str, float], against: str) -> str:
    """Return a markdown table, one line a method: means and deviations over seeds, and the difference to `against`."""
    before = next(iter(results.values()))[0]["before"]
    lines = [["before training", "", *(f"{before[k]:.3f}" for k in ("pass@1", "pass@8")), *[""] * 5]]
    for method, runs in results.items():
        gap = difference(runs, results[against])
        said = "" if method == against else "{:+.3f} [{:+.3f}, {:+.3f}] {}".format(*gap, verdict(gap))
        column = {key: [r[key] for r in runs] for key in ("pass@1", "pass@8", "kl", "length")}
        lines.append(
            [
                *(method, f"{rates[method]:g}", spread(column["pass@1"]), spread(column["pass@8"])),
                *(spread([grid_score(r) for r in runs]), spread([best_within_kl(r) for r in runs])),
                *(spread(column["kl"]), f"{np.mean(column['length']):.1f}", said),
            ]
        )
    titles = [
        "",
        "lr",
        "pass@1",
        "pass@8",
        "dev, last third",
        "best dev at KL ≤ 0.1",
        "KL",
        "length",
        f"against {against}",
    ]
    return table(titles, lines)


def best_baseline(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the method with the best mean test pass@1 that is not one of ours."""
    means = {m: np.mean([r["pass@1"] for r in runs]) for m, runs in results.items() if m not in OURS}
    return max(means, key=lambda m: means[m])


def write_csv(path: Path, results: dict[Job, dict[str, Any]]) -> None:
    """Write a line a run."""
    with path.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(
            ["task", "method", "lr", "seed", "pass@1", "pass@8", "greedy", "reward", "kl", "length", "seconds"]
        )
        for j, r in results.items():
            numbers = [f"{r[k]:.4f}" for k in ("pass@1", "pass@8", "greedy", "reward", "kl", "length")]
            writer.writerow([j.task, j.method, j.lr, j.seed, *numbers, f"{r['seconds']:.0f}"])


def draw(path: Path, by_task: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Plot dev accuracy over sampled tokens, one panel a task; bands are standard deviations over seeds."""
    try:
        import matplotlib
    except ImportError:
        return print("no picture: it needs matplotlib (make dev)")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(by_task), figsize=(6 * len(by_task), 4), squeeze=False)
    for axis, (task, results) in zip(axes[0], by_task.items(), strict=True):
        for method, runs in results.items():
            tokens = np.mean([r["tokens"] for r in runs], 0)
            dev = np.array([r["dev"] for r in runs])
            (line,) = axis.plot(tokens / 1000, dev.mean(0), label=method, linewidth=2.2 if method == "GSPO" else 1.2)
            axis.fill_between(
                tokens / 1000, *(dev.mean(0) + k * dev.std(0) for k in (-1, 1)), alpha=0.12, color=line.get_color()
            )
        axis.set(title=task, xlabel="sampled tokens, thousands", ylabel="held-out accuracy")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return None


def sections(by_task: dict, rates: dict[str, dict[str, float]], against: str | None) -> Iterator[str]:
    """Yield the heading and the table of each task; `against` None: the best baseline."""
    for task, results in by_task.items():
        yield f"### {task}\n"
        yield task_table(results, rates[task], against or best_baseline(results))

"""Compute the statistics of learning.py's runs, and write them as tables and pictures."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import table
from benchmarks.learning_search import dev_score

DRAWS = 10_000
SAMPLES = 8  # responses to each test prompt
Runs = list[dict[str, Any]]  # one a seed, in the order of seeds


def bootstrap_differences(mine: list[Runs], theirs: list[Runs]) -> np.ndarray:
    """Return sorted means of the difference in test pass@1 over resampled seeds and prompts, both paired: [DRAWS].

    mine, theirs: the runs on each task; the tasks weigh alike, and are not resampled.
    """
    total, rng = np.zeros(DRAWS), np.random.default_rng(0)
    for ours, others in zip(mine, theirs, strict=True):
        a, b = (np.array([r["correct_counts"] for r in runs], float) / SAMPLES for runs in (ours, others))
        gap = a - b  # [seeds, prompts]
        seeds = rng.integers(0, gap.shape[0], (DRAWS, gap.shape[0]))
        prompts = rng.integers(0, gap.shape[1], (DRAWS, gap.shape[1]))
        total += [gap[s][:, p].mean() for s, p in zip(seeds, prompts, strict=True)]
    return np.sort(total / len(mine))


def interval(means: np.ndarray, level: float) -> tuple[float, float]:
    """Return the percentile interval of sorted bootstrap means at this level, such as 0.95."""
    low, high = np.percentile(means, [50 - 50 * level, 50 + 50 * level])
    return float(low), float(high)


def p_value(means: np.ndarray) -> float:
    """Return the two-sided share of bootstrap means on the other side of 0, never below 1 / DRAWS."""
    return float(max(2 * min((means <= 0).mean(), (means >= 0).mean()), 1 / len(means)))


def holm(samples: dict[str, np.ndarray], alpha: float = 0.05) -> dict[str, tuple[float, float, str]]:
    """Return {name: (low, high, verdict)} for comparisons made together (Holm 1979).

    The k-th smallest of m p-values is judged at alpha / (m - k + 1), and its interval has that level. From the first
    that fails on, all are ties.
    """
    found, tied = {}, False
    for k, name in enumerate(sorted(samples, key=lambda name: p_value(samples[name]))):
        level = alpha / (len(samples) - k)
        low, high = interval(samples[name], 1 - level)
        tied = tied or low <= 0 <= high
        found[name] = (low, high, "tie" if tied else "ahead" if low > 0 else "behind")
    return found


def spread(values: list[float], digits: int = 3) -> str:
    """Return mean ± standard deviation over seeds."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def mean_pass_at_1(tasks: list[Runs]) -> float:
    """Return test pass@1, mean over seeds and then over tasks."""
    return float(np.mean([np.mean([run["pass@1"] for run in runs]) for runs in tasks]))


def comparisons(by_task: list[dict[str, Runs]], ours: str) -> dict[str, tuple[float, float, float, str]]:
    """Return {method: (difference, low, high, verdict)}: `ours` against each of the others, judged together.

    by_task: the methods' runs on one task, or on several, over which they are compared as a whole.
    """
    runs = {name: [task[name] for task in by_task] for name in by_task[0]}
    samples = {name: bootstrap_differences(runs[ours], others) for name, others in runs.items() if name != ours}
    ahead = {name: mean_pass_at_1(runs[ours]) - mean_pass_at_1(runs[name]) for name in samples}
    return {name: (ahead[name], *judged) for name, judged in holm(samples).items()}


def whole_table(by_task: dict[str, dict[str, Runs]], ours: str) -> str:
    """Return a markdown table of pass@1 on each task and on all, and how far `ours` is from each method on all."""
    tasks = list(by_task.values())
    against = comparisons(tasks, ours)
    lines = []
    for method in tasks[0]:
        each = [mean_pass_at_1([task[method]]) for task in tasks]
        said = "{:+.3f} [{:+.3f}, {:+.3f}] {}".format(*against[method]) if method in against else ""
        lines.append([method, *(f"{x:.3f}" for x in [*each, np.mean(each)]), said])
    return table(["pass@1", *by_task, "mean", f"{ours}, ahead by"], lines)


def task_table(runs: dict[str, Runs], before: dict[str, float], ours: str) -> str:
    """Return a markdown table, one line a method: means and deviations over seeds, and how far `ours` is from it."""
    against = comparisons([runs], ours)
    lines = [["before training", "", "", f"{before['pass@1']:.3f}", f"{before['pass@8']:.3f}", *[""] * 5]]
    for method, results in runs.items():
        said = "{:+.3f} [{:+.3f}, {:+.3f}] {}".format(*against[method]) if method in against else ""
        sampled = np.mean([r["tokens"][-1] for r in results])
        column = {key: [r[key] for r in results] for key in ("pass@1", "pass@8", "kl", "length", "cpu_seconds")}
        lines.append(
            [
                *(method, f"{results[0]['lr']:g}", f"{results[0]['kl_coef']:g}"),
                *(spread(column["pass@1"]), spread(column["pass@8"]), spread([dev_score(r) for r in results])),
                *(spread(column["kl"]), f"{sampled / 1000:.0f}" if sampled else "none"),
                *(f"{np.mean(column['cpu_seconds']):.0f}", said),
            ]
        )
    titles = ["", "lr", "KL weight, or beta", "pass@1", "pass@8", "dev, at the end", "KL", "tokens, thousands", "CPU s"]
    return table([*titles, f"{ours}, ahead by"], lines)


def draw(path: Path, by_task: dict[str, dict[str, Runs]], ours: str) -> None:
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
            tokens = np.mean([r["tokens"] for r in runs], 0) / 1000
            if not tokens.any():
                continue  # it samples nothing while it learns
            dev = np.array([r["dev"] for r in runs])
            (line,) = axis.plot(tokens, dev.mean(0), label=method, linewidth=2.2 if method == ours else 1.2)
            bounds = (dev.mean(0) + k * dev.std(0) for k in (-1, 1))
            axis.fill_between(tokens, *bounds, alpha=0.12, color=line.get_color())
        axis.set(title=task, xlabel="sampled tokens, thousands", ylabel="held-out accuracy")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return None

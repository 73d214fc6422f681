"""Draw the learning curves of a run as one picture: `python -m gspo.plot outputs/quick docs/learning_curve.png`."""

import argparse
import json
from pathlib import Path

from gspo.checkpoint.find_runs import run_folder_of
from gspo.config import Health
from gspo.errors import UserError
from gspo.metrics.health import healthy_range
from gspo.metrics.run_log import SEED_FIVE
from gspo.system.program import guarded

INK, SOFT, BAND = "#1f4e79", "#9db8d2", "#e6f2e6"


def smooth(values: list[float], span: int = 9) -> list[float]:
    """Return the running mean over up to `span` neighbours."""
    half = span // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def draw(run: Path, out: Path) -> None:
    """Draw a panel for each of the five curves, raw and smoothed, with healthy ranges, round starts and test scores."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise UserError("pictures need matplotlib: `make dev`, or pip install -r requirements-dev.txt.") from e
    try:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except OSError as e:
        raise UserError(f"{run} is not a run folder: {e.strerror} ({run / 'metrics.jsonl'}).") from e
    figure, axes = plt.subplots(1, 5, figsize=(16, 3), layout="constrained")
    starts = [b["step"] for a, b in zip(rows, rows[1:], strict=False) if a["round"] != b["round"]]
    for axis, name in zip(axes, SEED_FIVE, strict=True):
        points = [(r["step"], r[name]) for r in rows if name in r]
        steps, values = [p[0] for p in points], [p[1] for p in points]
        low, high = healthy_range(name, Health())
        if low is not None:
            axis.axhspan(low, high if high is not None else 1.0, color=BAND, zorder=0)
        axis.plot(steps, values, color=SOFT, linewidth=0.8)
        axis.plot(steps, smooth(values), color=INK, linewidth=1.8)
        for start in starts:
            axis.axvline(start, color="#888888", linewidth=0.8, linestyle=":")
        axis.set_title(name, fontsize=11)
        axis.set_xlabel("step", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[3].set_yscale("log")
    title = f"{run.name}: {rows[-1]['step']} steps"
    reports = [run / f"eval_{name}.json" for name in ("before", "after")]
    if all(r.exists() for r in reports):
        before, after = (json.loads(r.read_text(encoding="utf-8")) for r in reports)
        shown = ("pass@1", "greedy") if "pass@1" in before else ("reward_mean",)  # none is right by rank_responses
        changes = [f"{name} {before[name]:.2f} to {after[name]:.2f}" for name in shown]
        title += f"; on {after['prompts']} unseen problems {', '.join(changes)}"
    figure.suptitle(title, fontsize=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gspo.plot", description=__doc__)
    parser.add_argument("run")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    draw(run_folder_of(args.run), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    guarded(main)

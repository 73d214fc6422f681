"""Draw the learning curves of runs as one picture.

    python -m gspo.plot outputs/quick docs/learning_curve.png
    python -m gspo.plot outputs/one outputs/two both.png

A panel a curve: thin the values, bold their running mean over up to 9 steps of a round, where a run has steps enough
for one; green the healthy range; dotted the rounds. One run's title has its evaluation before and after training.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from gspo.checkpoint.evaluations import comparable_evaluations
from gspo.checkpoint.find_runs import run_folder_of
from gspo.command_line import parse_arguments
from gspo.config import Health
from gspo.errors import UserError
from gspo.metrics.health import healthy_range
from gspo.metrics.run_log import SEED_FIVE
from gspo.read_paths import check_path, home_path
from gspo.report.read_run import read_steps, shown
from gspo.system.console import say
from gspo.system.help_text import HelpText
from gspo.system.language import language, translated, word
from gspo.system.program import guarded

COLOURS = (("#1f4e79", "#9db8d2"), ("#a1481f", "#dfb49d"), ("#3c6e2f", "#b1cfa6"), ("#6a3d85", "#c7b0d4"))
BAND = "#e6f2e6"
CHINESE_FONTS = re.compile(r"(NotoSans.*CJK|SourceHanSans|wqy|msyh|simhei|PingFang)[^/]*$", re.IGNORECASE)  # files
_fonts: list[str] = []  # that the picture takes beside the usual one
SPAN, SHARE = 9, 10  # steps of a running mean: at most so many, and at most this fraction of a run's


def smooth(rounds: list[float], values: list[float], span: int) -> list[float]:
    """Return the running mean over up to `span` neighbours of the same round."""
    half, means = span // 2, []
    for i in range(len(values)):
        near = range(max(0, i - half), min(len(values), i + half + 1))
        window = [values[k] for k in near if rounds[k] == rounds[i]]
        means.append(sum(window) / len(window))
    return means


def mean_span(steps: int) -> int:
    """Return over how many steps to take the mean, an odd number; 1 where a run is too short for any."""
    span = min(SPAN, steps // SHARE)
    return max(1, span - (span + 1) % 2)


def draw(runs: list[Path], out: Path) -> None:
    """Draw the five curves of each run into `out`. UserError where matplotlib is missing or a folder is no run."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise UserError(
            "pictures need matplotlib: `make dev`, or pip install -r requirements-dev.txt. `python -m gspo.report` "
            "draws the curves without it, as an HTML page."
        ) from e
    notes: list[str] = []
    rows_of = {run: read_steps(run, notes) for run in runs}
    _choose_font(matplotlib)
    figure, axes = plt.subplots(1, 5, figsize=(16, 3), layout="constrained")
    for axis, name in zip(axes, SEED_FIVE, strict=True):
        _prepare(axis, name)
        for k, (run, rows) in enumerate(rows_of.items()):
            _draw_curve(axis, rows, name, COLOURS[k % len(COLOURS)], label=_plain(run.name), dotted=len(runs) == 1)
    if len(runs) > 1:
        axes[0].legend(fontsize=8, frameon=False)
    else:
        figure.suptitle(_plain(_title(runs[0], rows_of[runs[0]])), fontsize=11)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110)
    except ValueError as e:  # matplotlib's for an ending that it does not know
        raise UserError(f"{out}: {str(e).split(' (')[0]}. Name a .png, .svg or .pdf file.") from e
    finally:
        plt.close(figure)


def _choose_font(matplotlib: Any) -> None:
    """Take a font that has Chinese characters, beside the usual one, where there is one; else say, to those who read
    Chinese, that the picture is in English."""
    manager = matplotlib.font_manager
    files = sorted(filter(CHINESE_FONTS.search, manager.findSystemFonts()), key=lambda file: "Regular" not in file)
    for file in files[:1]:  # by its file: matplotlib's own list may be older than the font
        manager.fontManager.addfont(file)
    _fonts[:] = [manager.FontProperties(fname=file).get_name() for file in files[:1]]
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *_fonts]
    if language() == "zh" and not _fonts:
        say("note: matplotlib finds no font with Chinese characters, so the picture is in English")


def _in_picture(text: str) -> str:
    """Return a text of the picture in the user's language, if there is a font for it."""
    return translated(text) if _fonts and language() == "zh" else text


def _prepare(axis: Any, name: str) -> None:
    """Draw what a panel has without a curve: its title, its healthy range."""
    low, high = healthy_range(name, Health())
    if low is not None:
        axis.axhspan(low, high if high is not None else 1.0, color=BAND, zorder=0)
    if name == "kl_divergence":
        axis.set_yscale("log")
    axis.set_title(name, fontsize=11)
    axis.set_xlabel(word("step") if _fonts else "step", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _draw_curve(
    axis: Any, rows: list[dict[str, Any]], name: str, colours: tuple[str, str], label: str, dotted: bool
) -> None:
    """Draw one run's curve into a panel, and dotted lines where its rounds begin."""
    points = [(row["step"], row[name], row["round"]) for row in rows if name in row]
    steps, values, rounds = (list(x) for x in zip(*points, strict=True)) if points else ([], [], [])
    bold, thin = colours
    span = mean_span(len(values))
    if span > 1:
        axis.plot(steps, values, color=thin, linewidth=0.8)
    axis.plot(steps, smooth(rounds, values, span), color=bold, linewidth=1.8, label=label)
    starts = [b["step"] for a, b in zip(rows, rows[1:], strict=False) if a["round"] != b["round"]]
    for start in starts if dotted else []:
        axis.axvline(start, color="#888888", linewidth=0.8, linestyle=":")


def _title(run: Path, rows: list[dict[str, Any]]) -> str:
    """Return a run's name, its steps and, where both were evaluated, the change of the table."""
    title = _in_picture(f"{run.name}: {rows[-1]['step']} steps")
    reports, _ = comparable_evaluations(run, rows[-1]["step"])
    if len(reports) == 2:
        before, after = reports.values()
        names = ("pass@1", "greedy") if "pass@1" in before else ("reward_mean",)  # none is right by rank_responses
        known = [name for name in names if all(isinstance(r.get(name), float) for r in (before, after))]
        changes = [_in_picture(f"{name} {before[name]:.2f} to {after[name]:.2f}") for name in known]
        title += "; " + _in_picture(f"on {after['prompts']} unseen problems {', '.join(changes)}")
    return title


def _plain(text: str) -> str:
    """Return a text of which matplotlib reads nothing as mathematics."""
    return shown(text).replace("$", r"\$")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gspo.plot", description=__doc__, formatter_class=HelpText)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="outputs/NAME; several share the panels")
    parser.add_argument("out", type=Path, metavar="PICTURE", help="the file to write: .png, .svg or .pdf")
    args = parse_arguments(parser)
    check_path(str(args.out), "PICTURE", written=True)
    draw([run_folder_of(check_path(name, "RUN")) for name in args.runs], home_path(args.out))
    say(f"wrote {args.out}")


if __name__ == "__main__":
    guarded(main)

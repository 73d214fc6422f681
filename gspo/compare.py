"""Compare runs in a table: the settings in which they differ, what they reached, and what that cost.

    python -m gspo.compare outputs/one outputs/two [outputs/three ...]

Held-out figures are those of the last and of the best step that has them; the figures of the test prompts are those
before and after training, with 95 % intervals. Where runs were measured on different prompts, a line says so.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo.checkpoint import fingerprints
from gspo.checkpoint.evaluations import WORDS, comparable_evaluations, figure
from gspo.checkpoint.find_runs import run_folder_of
from gspo.command_line import parse_arguments
from gspo.errors import UserError
from gspo.read_paths import check_path
from gspo.report.page import differing_settings
from gspo.report.read_run import read_settings, read_steps, shown
from gspo.system.cells import columns
from gspo.system.console import say, time_left
from gspo.system.help_text import HelpText
from gspo.system.language import translated, word
from gspo.system.program import guarded

HELD_OUT = {  # curve -> its words; larger is better
    "heldout/accuracy": "held-out accuracy",
    "heldout/reward_mean": "held-out reward",
    "win_rate": "win rate of a round",
}
WIDEST = 40  # characters of a cell


@dataclass
class RunFigures:
    """What is compared of a run."""

    name: str
    folder: Path
    settings: dict[str, str]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    evaluations: dict[str, dict[str, Any]]  # before, after
    notes: list[str]


def read_figures(folder: Path) -> RunFigures:
    """Read a run's folder, but for its samples. UserError where it holds no steps, or is damaged."""
    notes: list[str] = []
    rows = read_steps(folder, notes)
    if rows[0]["step"] > 1:
        notes.append(
            f"it begins with step {rows[0]['step']}: tokens sampled and rounds count what came before, the time "
            "does not"
        )
    settings, _, _ = read_settings(folder / "config.yaml")
    evaluations, note = comparable_evaluations(folder, rows[-1]["step"])
    return RunFigures(
        shown(folder.name), folder, settings, rows, evaluations, [*notes, *([note.rstrip(".")] if note else [])]
    )


def comparison(runs: list[RunFigures]) -> str:
    """Return the tables of settings, figures and cost, a column a run."""
    names = [run.name for run in runs]
    titles = [run.name if names.count(run.name) == 1 else shown(str(run.folder)) for run in runs]
    parts = {
        "settings that differ": differing_settings([run.settings for run in runs]),
        "held out": [row for curve, words in HELD_OUT.items() for row in _held_out_rows(runs, curve, words)],
        "test prompts": _evaluation_rows(runs),
        "cost": _cost_rows(runs),
    }
    blocks = [_table([[word(title), *titles], *rows]) for title, rows in parts.items() if rows]
    notes = [f"note: {run.name}: {note}." for run in runs for note in run.notes] + _differences(runs)
    return "\n\n".join([*blocks, *notes])


def _held_out_rows(runs: list[RunFigures], curve: str, words: str) -> list[list[str | None]]:
    """Return the row of the last value of a curve and the row of its best, each with its step."""
    last, best = ([f"{word(words)}{word(which)}"] for which in (", last", ", best"))
    for run in runs:
        points = [(row[curve], row["step"]) for row in run.rows if math.isfinite(row.get(curve, math.nan))]
        last.append(f"{points[-1][0]:.3f} {_at(points[-1][1])}" if points else None)
        value, step = max(points, key=lambda point: (point[0], -point[1])) if points else (math.nan, 0)
        best.append(f"{value:.3f} {_at(step)}" if points else None)
    return [row for row in (last, best) if any(row[1:])]


def _at(step: int) -> str:
    return translated(f"(step {step})")


def _evaluation_rows(runs: list[RunFigures]) -> list[list[str | None]]:
    """Return a row a metric and time: the value with its interval."""
    reports = [report for run in runs for report in run.evaluations.values()]
    metrics = dict.fromkeys(metric for report in reports for metric in report["interval"])
    rows = []
    for metric in metrics:
        for when in ("before", "after"):
            cells = [figure(run.evaluations.get(when, {}), metric) for run in runs]
            rows.append([f"{word(shown(metric))} {word(when)}", *cells])
    return [row for row in rows if any(row[1:])]


def _cost_rows(runs: list[RunFigures]) -> list[list[str | None]]:
    """Return what each run has taken: its steps, tokens, time and memory."""

    def column(run: RunFigures) -> list[str | None]:
        last, seconds = run.rows[-1], sum(_finite(row, "time/step") for row in run.rows)
        tokens, peak = last.get("tokens_sampled"), max(_finite(row, "memory/peak_gib") for row in run.rows)
        return [
            f"{last['step']}",
            f"{last['round'] + 1:.0f}",
            None if tokens is None else f"{tokens:,.0f}",
            translated(time_left(seconds)),
            f"{peak:.2f} GiB" if peak else None,
        ]

    titles = ("steps", "rounds", "tokens sampled", "time of the steps", "peak memory of a process")
    rows = [list(row) for row in zip(map(word, titles), *map(column, runs), strict=True)]
    return [row for row in rows if any(row[1:])]


def _finite(row: dict[str, Any], name: str) -> float:
    """Return a value of a step; 0 where it is not there, or not finite."""
    value = row.get(name, 0.0)
    return value if math.isfinite(value) else 0.0


def _differences(runs: list[RunFigures]) -> list[str]:
    """Say where figures of the runs must not be compared, as they were measured in different ways."""
    said = []
    if len({fingerprints.read(run.folder).get("data.val_files") for run in runs}) > 1:
        said.append("warning: the runs have different held-out prompts: their held-out figures do not compare.")
    settings = [report["settings"] for run in runs for report in run.evaluations.values()]
    other = [word(words) for key, words in WORDS.items() if len({str(each.get(key)) for each in settings}) > 1]
    if other:
        how = f" {word('and')} ".join(other)
        said.append(f"warning: test prompts were evaluated with different {how}: those do not compare.")
    return said


def _table(rows: list[list[str | None]]) -> str:
    """Return rows as lines of aligned columns; a dash where there is nothing."""
    cells = [["-" if x is None else shown(str(x)).replace("\n", " ") for x in row] for row in rows]
    cells[1:] = [[x if len(x) <= WIDEST else f"{x[: WIDEST - 3]}..." for x in row] for row in cells[1:]]
    return columns(cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gspo.compare", description=__doc__, formatter_class=HelpText)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="outputs/NAME; at least two")
    args = parse_arguments(parser)
    folders = [run_folder_of(check_path(name, "RUN")) for name in args.runs]
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise UserError("name at least two runs, each once. python -m gspo.report shows a single one.")
    say(comparison([read_figures(folder) for folder in folders]))


if __name__ == "__main__":
    guarded(main)

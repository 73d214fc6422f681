"""Write one HTML page about one run, or about several side by side: curves, evaluations, settings and samples.

    python -m gspo.report outputs/quick
    python -m gspo.report outputs/quick outputs/other --out both.html

The page needs no server and fetches nothing; open it with any browser. RUN is a run's folder, its checkpoints, or one
of them.
"""

import argparse
from pathlib import Path

import gspo  # noqa: F401 -- before torch

# isort: split
from gspo.checkpoint.find_runs import run_folder_of
from gspo.command_line import parse_arguments
from gspo.errors import UserError
from gspo.read_paths import check_path, home_path
from gspo.report.page import page_of
from gspo.report.read_run import fit, read_run
from gspo.system.console import say
from gspo.system.files import write_text
from gspo.system.help_text import HelpText
from gspo.system.language import translated
from gspo.system.program import guarded


def write_report(names: list[str], out: Path | None = None, language: str | None = None) -> Path:
    """Write the page of these runs, into the first one's folder unless `out` names a file; return its path."""
    folders = [run_folder_of(check_path(name, "RUN")) for name in names]
    twice = next((folder for i, folder in enumerate(folders) if folder.resolve() in _resolved(folders[:i])), None)
    if twice:
        raise UserError(f"{twice} is named twice; name each run once.")
    out = out or folders[0] / "report.html"
    check_path(str(out), "--out", written=True)
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out {out}: name a file in a folder that exists.")
    runs = [read_run(folder) for folder in folders]
    every = fit(runs)
    for run in runs:
        for note in run.notes:
            say(f"{run.folder}: {note.rstrip('.')}.")
    write_text(out, page_of(runs, language))
    steps = ", ".join(
        translated(f"{run.name}: {run.last_step} steps, {len(run.samples)} groups of samples") for run in runs
    )
    say(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB; {steps}{'' if every == 1 else ' after thinning'})")
    return out


def _resolved(folders: list[Path]) -> list[Path]:
    return [folder.resolve() for folder in folders]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gspo.report", description=__doc__, formatter_class=HelpText)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="outputs/NAME; several are drawn over each other")
    parser.add_argument("--out", type=Path, help="the file to write (default: report.html in the first run's folder)")
    parser.add_argument("--lang", choices=("en", "zh"), help="the page's language (default: the browser's)")
    args = parse_arguments(parser)
    write_report(args.runs, home_path(args.out) if args.out else None, args.lang)


if __name__ == "__main__":
    guarded(main)

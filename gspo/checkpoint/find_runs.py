"""Find the run, or the checkpoint of one, that a user names: the same names for every program.

A run is named by its folder, by its `checkpoints`, by one of these, by `best` below either, or by the folder of all
runs, which stands for the latest.
"""

import os
import re
from pathlib import Path

from gspo.errors import UserError
from gspo.read_paths import home_path

BEST = "best"


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a `checkpoints` folder, oldest first."""
    found = (p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name))
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint in a run's folder or its `checkpoints` folder; None where there is none.

    It is not verified: resuming and exporting do that.
    """
    found = [*reversed(list_checkpoints(folder)), *reversed(list_checkpoints(folder / "checkpoints"))]
    return next((p for p in found if (p / "trainer" / "state.json").exists()), None)


def best_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that `best` leads to, in a run's folder or its `checkpoints` folder; None without one."""
    for place in (folder, folder / "checkpoints"):
        step = place / (place / BEST).resolve().name
        if (place / BEST).is_dir() and step.is_dir():
            return step
    return None


def checkpoint_of(name: str | Path) -> str:
    """Return the checkpoint that is named: `best`, or the newest of a run. Any other folder, or a hub name, as it is.

    `~` is expanded. UserError where a run has no such checkpoint, or several runs could be meant.
    """
    expanded = os.path.expanduser(name)
    folder = Path(expanded)
    if folder.name == BEST and folder.parent.is_dir():
        if best := best_checkpoint(folder.parent):
            return str(best)
        if newest := latest_checkpoint(folder.parent):
            raise UserError(
                f"{folder}: no checkpoint was kept as the best (trainer.keep_best, and held-out prompts to tell by). "
                f"The newest is {newest}."
            )
    if newest := latest_checkpoint(folder):
        return str(newest)
    if not folder.is_dir() or (folder / "config.json").exists():
        return expanded
    if _is_run(folder):
        raise UserError(f"{folder} is a run that has no checkpoint yet. Wait for its first, or name another run.")
    runs = runs_in(folder)
    found = [newest for run in runs if (newest := latest_checkpoint(run))]
    if len(found) > 1:
        raise UserError(f"{folder} holds several runs. Name one of them: {_names(runs)}.")
    return str(found[0]) if found else expanded


def run_folder_of(name: str | Path) -> Path:
    """Return the folder of the run that is named. A folder that is no run, and belongs to none, is returned as it is.

    `~` is expanded. UserError where there is no such folder, or several runs could be meant.
    """
    folder = home_path(name)
    if folder.name == BEST and not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. Name a run, such as outputs/quick.")
    if (folder / "metrics.jsonl").exists():
        return folder
    above = [*folder.resolve().parents][:2]
    latest = (folder / "checkpoints").resolve().parent  # of a folder of runs, by its link
    run = next((parent for parent in (*above, latest) if _is_run(parent)), None)
    if run is None:
        runs = runs_in(folder)
        if len(runs) > 1:
            raise UserError(f"{folder} holds several runs. Name one of them: {_names(runs)}.")
        return runs[0] if runs else folder
    return run if folder.is_absolute() else Path(os.path.relpath(run))


def config_of(checkpoint: str | Path) -> Path | None:
    """Return config.yaml of the run that a checkpoint belongs to; None where it belongs to none."""
    file = Path(checkpoint).resolve().parent.parent / "config.yaml"
    return file if file.is_file() else None


def runs_in(folder: Path) -> list[Path]:
    """Return the runs that lie in a folder, by name."""
    return sorted(path.parent for path in folder.glob("*/config.yaml") if _is_run(path.parent))


def _is_run(folder: Path) -> bool:
    """Return whether a folder is a run's: it has a configuration, and checkpoints or curves."""
    parts = (folder / "checkpoints", folder / "metrics.jsonl")
    return (folder / "config.yaml").is_file() and any(part.exists() for part in parts)


def _names(runs: list[Path]) -> str:
    return ", ".join(run.name for run in runs[:5]) + (", ..." if len(runs) > 5 else "")

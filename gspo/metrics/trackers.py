"""Write a run's metrics and samples: the interface of a tracker, and the two JSON Lines files."""

import json
from pathlib import Path
from typing import Any

from gspo.config import Config
from gspo.system.files import AppendedFile, write_text
from gspo.system.output import printable_json

Samples = dict[int, dict[str, Any]]  # place in the global batch -> prompt, responses, rewards, the widest pair


class Tracker:
    """One place that a run's numbers go to. To add one: a subclass, and its line of TRACKERS in run_log.py (of a
    package that may be missing: tracker_packages.py).

    Nothing here may stop a run: a method returns the error when what it was given has to wait for room on the disk.
    """

    waiting = False  # whether anything has not been written yet

    def __init__(self, folder: Path, cfg: Config, start_step: int):
        """Open the tracker of a run that goes on after `start_step`; what there is of later steps is dropped."""

    def metrics(self, step: int, values: dict[str, float]) -> OSError | None:
        """Write the metrics of a step, counted from 1."""

    def samples(self, step: int, rows: Samples) -> OSError | None:
        """Write some groups of a step."""

    def close(self) -> OSError | None:
        """Write what still waits."""


class FileTracker(Tracker):
    """A tracker of one file, which is only ever appended to."""

    file: AppendedFile

    @property
    def waiting(self) -> bool:
        return bool(self.file.waiting)

    def close(self) -> OSError | None:
        return self.file.append(b"")


class MetricsFile(FileTracker):
    """metrics.jsonl: one object a step."""

    def __init__(self, folder: Path, cfg: Config, start_step: int):
        drop_steps_after(folder / "metrics.jsonl", start_step)
        self.file = AppendedFile(folder / "metrics.jsonl")

    def metrics(self, step: int, values: dict[str, float]) -> OSError | None:
        return self.file.append((json.dumps({"step": step, **values}) + "\n").encode())


class SamplesFile(FileTracker):
    """samples.jsonl: one object a group."""

    def __init__(self, folder: Path, cfg: Config, start_step: int):
        drop_steps_after(folder / "samples.jsonl", start_step)
        self.file = AppendedFile(folder / "samples.jsonl")

    def samples(self, step: int, rows: Samples) -> OSError | None:
        lines = [json.dumps({"step": step, **row}, ensure_ascii=False, default=str) + "\n" for row in rows.values()]
        return self.file.append(
            printable_json("".join(lines)).encode("utf-8", "backslashreplace")
        )  # half a character: \\ud83d


def drop_steps_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a half-written last line: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # texts may hold other line ends
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    write_text(path, "".join(line + "\n" for line in kept))


def read_rows(path: Path) -> list[dict[str, float]]:
    """Return the objects of a JSON Lines file; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

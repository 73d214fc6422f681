"""Write Tensorboard's event file, record by record.

It has the format of SummaryWriter, whose thread would end at a full disk.
"""

import io
import os
import socket
import string
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from gspo.config import Config
from gspo.metrics.trackers import FileTracker, Samples
from gspo.system.files import AppendedFile
from gspo.system.output import printable

PAGE = {  # chart title on the custom-scalars page -> (curve, healthy low, healthy high), limits of `config.Health`
    "reward_mean (healthy: rises)": ("reward_mean", None, None),
    "reward_max (healthy: rises)": ("reward_max", None, None),
    "preference_accuracy (healthy: above 0.6)": ("preference_accuracy", "preference_accuracy_min", None),
    # without its upper limit, a hundred times the lower one: beside that line the curve would be flat
    "kl_divergence (healthy: 0.001 to 0.1)": ("kl_divergence", "kl_divergence_min", None),
    "ranking_loss (healthy: falls)": ("ranking_loss", None, None),
    "heldout/accuracy (should rise)": ("heldout/accuracy", None, None),
    "response/length_mean": ("response/length_mean", None, None),
    "response/cutoff (share of responses cut off)": ("response/cutoff", None, None),
}
_ENTITIES = {ord(c): f"&#{ord(c)};" for c in string.punctuation} | {ord("\n"): "<br>"}
SAMPLES, SAMPLES_EVERY = 2, 10  # groups shown as text, and every how many steps


class TensorboardFile(FileTracker):
    """tensorboard/: one event file for each start of the run; curves, limits of healthy ranges, tables of samples."""

    def __init__(self, folder: Path, cfg: Config, start_step: int):
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = AppendedFile(folder / "tensorboard" / name)
        bounds = sorted({bound for _, *both in PAGE.values() for bound in both if bound})
        self.limits = {f"healthy/{bound}": getattr(cfg.health, bound) for bound in bounds}
        self._add(Event(file_version="brain.Event:2"))
        if start_step:  # what earlier files have of later steps no longer counts
            self._add(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))
        layout = {"GSPO": {title: ["Multiline", _tags(*chart)] for title, chart in PAGE.items()}}
        self._add(Event(summary=summary.custom_scalars(layout)))

    def metrics(self, step: int, values: dict[str, float]) -> OSError | None:
        points = [Summary.Value(tag=name, simple_value=value) for name, value in (values | self.limits).items()]
        return self._add(Event(step=step, summary=Summary(value=points)))

    def samples(self, step: int, rows: Samples) -> OSError | None:
        error = None
        for place, row in rows.items():
            if place < SAMPLES and (step == 1 or step % SAMPLES_EVERY == 0):
                error = self._add(Event(step=step, summary=summary.text(f"samples/{place}", _table(row))))
        return error

    def _add(self, event: Event) -> OSError | None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        return self.file.append(record.getvalue())


def _tags(name: str, low: str | None, high: str | None) -> list[str]:
    return [f"^{name}$", *(f"^healthy/{bound}$" for bound in (low, high) if bound)]


def _table(row: dict[str, Any]) -> str:
    """Write a group as a Markdown table, best response first. Texts are shown as they are: none of their characters
    is Markdown or HTML, an image in an answer is not fetched."""

    def cell(text: str) -> str:
        return printable(str(text)).translate(_ENTITIES)

    lines = [
        f"**{cell(row['prompt'])}** (answer {cell(row['ground_truth'])})",
        "",
        "| reward | response | |",
        "|---|---|---|",
    ]
    for text, reward in sorted(zip(row["responses"], row["rewards"], strict=True), key=lambda x: -x[1]):
        mark = "chosen" if text == row["chosen"] else "rejected" if text == row["rejected"] else ""
        lines.append(f"| {reward:g} | {cell(text)} | {mark} |")
    return "\n".join(lines)

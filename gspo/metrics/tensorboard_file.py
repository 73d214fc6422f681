"""Tensorboard's event files, a record at a time: as its SummaryWriter writes them, without a thread that a full disk
would end."""

import io
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from gspo.system.files import Growing


class Board:
    """One event file. With `purge_step` what earlier files have from that step on no longer counts."""

    def __init__(self, folder: Path, purge_step: int | None):
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = Growing(folder / name)
        self._add(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def page(self, layout: dict[str, dict[str, list]]) -> OSError | None:
        """Charts on the page Custom scalars."""
        return self._add(Event(summary=summary.custom_scalars(layout)))

    def scalars(self, values: dict[str, float], step: int) -> OSError | None:
        """A point on each curve."""
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        return self._add(Event(step=step, summary=Summary(value=points)))

    def text(self, tag: str, text: str, step: int) -> OSError | None:
        """Markdown."""
        return self._add(Event(step=step, summary=summary.text(tag, text)))

    def _add(self, event: Event) -> OSError | None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        return self.file.append(record.getvalue())

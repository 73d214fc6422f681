"""Schedulers take machines away: SIGTERM or SIGUSR1 asks the run to finish its step, save, and leave."""

import signal
from types import FrameType


class Preemption:
    """From now on these signals no longer end the process: `by` tells which one came."""

    def __init__(self) -> None:
        self.by = ""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.by = signal.Signals(number).name

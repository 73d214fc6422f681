"""Turn SIGTERM and SIGUSR1, which schedulers send before they take a machine away, into a request to stop.

The run then finishes its step, saves and ends.
"""

import signal
from types import FrameType


class Preemption:
    """Catch the two signals, which no longer end the process. `signal_name` is the one that came, or empty."""

    def __init__(self) -> None:
        self.signal_name = ""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._record)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

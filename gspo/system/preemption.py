"""Turn SIGTERM and SIGUSR1, which schedulers send before they take a machine away, into a request to stop.

The run then finishes its step, saves and ends. Whoever does not want to wait for that sends a second one, or Ctrl-C.
"""

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

REPEATED_S = 3.0  # `timeout` and launchers send the same signal twice within this time


class Preemption:
    """Catch the two signals, which no longer end the process. `signal_name` is the one that came, or empty.

    A second SIGTERM or Ctrl-C ends the process at once, even where the interpreter waits in a library for what never
    comes and runs no handler: a thread reads the numbers of the signals.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._record)
        self.arrivals, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        signal.set_wakeup_fd(wakeup.detach(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def _watch(self) -> None:
        """End the process when it is asked to end a second time."""
        first: float | None = None
        while True:
            for number in self.arrivals.recv(64):
                now = time.monotonic()
                if number not in (signal.SIGTERM, signal.SIGINT):
                    continue
                if first is None:
                    first = now
                elif now - first > REPEATED_S:
                    end_at_once(number)


def end_at_once(number: int) -> None:
    """End the process with the exit code of a signal; what it has started sees that and ends as well."""
    try:
        name = signal.Signals(number).name
        print(f"{name} came again: ended at once; the last checkpoint is whole", file=sys.stderr, flush=True)
    finally:
        os._exit(128 + number)

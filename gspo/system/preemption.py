"""Turn SIGTERM and SIGUSR1, which schedulers send before they take a machine away, into a request to stop.

The run then finishes its step, saves and ends. Whoever does not want to wait for that sends a second one, or Ctrl-C.
Before its first step and after its last one there is nothing to finish: the first signal ends it at once.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from gspo.system.console import say
from gspo.system.language import translated

REPEATED_S = 3.0  # `timeout` and launchers send the same signal twice within this time


class Preemption:
    """Catch the two signals, which do not end the process while it is `finishing_steps`. `signal_name` is the one that
    came, or empty.

    A second SIGTERM or Ctrl-C ends the process at once, even where the interpreter waits in a library for what never
    comes and runs no handler: a thread reads the numbers of the signals.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self.in_steps = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._record)
        self.arrivals, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        signal.set_wakeup_fd(wakeup.detach(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    @contextmanager
    def finishing_steps(self) -> Iterator[None]:
        """Let the first signal be a request, as what is done inside has a step to finish and to save."""
        self.in_steps = True
        try:
            yield
        finally:
            self.in_steps = False

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def _watch(self) -> None:
        """End the process when it has nothing to finish, or is asked to end a second time."""
        first: float | None = None
        asked = False
        while True:
            for number in self.arrivals.recv(64):
                now, name = time.monotonic(), signal.Signals(number).name
                if number in (signal.SIGTERM, signal.SIGUSR1):
                    if not self.in_steps:
                        end_at_once(number, f"{name}: ended at once, as there is no step to finish")
                    if not asked:
                        _say_that_it_waits(name)
                    asked = True
                if number not in (signal.SIGTERM, signal.SIGINT):
                    continue
                if first is None:
                    first = now
                elif now - first > REPEATED_S:
                    end_at_once(number, f"{name} came again: ended at once; the last checkpoint is whole")


def _say_that_it_waits(name: str) -> None:
    """Say what the run does first, from a thread of its own: the one that watches must not wait for the output."""
    line = lambda: say(f"{name}: the step is finished and saved first; another SIGTERM or Ctrl-C ends the run at once")  # noqa: E731
    threading.Thread(target=line, daemon=True).start()


def end_at_once(number: int, why: str) -> None:
    """End the process with the exit code of a signal; what it has started sees that and ends as well."""
    try:
        print(translated(why), file=sys.stderr, flush=True)
    finally:
        os._exit(128 + number)

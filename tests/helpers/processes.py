"""For tests that kill: a program with all it starts, found again by a mark in their environment."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

from repository import PROGRAM_ENV, ROOT

STACKS = {"PYTHONFAULTHANDLER": "1"}  # are written where a program is ended by SIGABRT


def new_mark() -> str:
    """What no other program of the tests has in its environment."""
    return f"{os.getpid()}-{time.monotonic_ns()}"


def marked(mark: str) -> dict[int, str]:
    """{pid: command line} of everything with this mark; zombies have no environment any more."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"GSPO_TEST_MARK={mark}".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def abort(mark: str) -> str:
    """End what hangs, so that all of it writes the stacks of its threads; return what it was."""
    hung = marked(mark)
    for pid in hung:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)
    return "\n".join(f"{pid}: {line}" for pid, line in hung.items())


class Program:
    """`python ARGS`, with its own mark; the test's end (conftest.py) ends it, too."""

    started: ClassVar[list["Program"]] = []

    def __init__(self, *args, log: Path, env: dict[str, str] | None = None):
        self.mark = new_mark()
        self.log = log
        self.started.append(self)
        with log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, args)],
                cwd=ROOT,
                stdout=out,
                stderr=out,
                env={**os.environ, **PROGRAM_ENV, **STACKS, **(env or {}), "GSPO_TEST_MARK": self.mark},
            )

    def ended(self, patience_s: float = 600.0) -> int:
        """Wait for its end; return its exit code. Where it hangs, fail with what it said, and show where it hangs."""
        try:
            return self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            pass
        told = abort(self.mark)
        time.sleep(2.0)
        raise AssertionError(f"hangs after {patience_s:g} s:\n{told}\n{self.log.read_text()[-20_000:]}")

    def alive(self) -> dict[int, str]:
        """{pid: command line} of everything with our mark."""
        return marked(self.mark)

    def kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def orphans(self, patience_s: float = 60.0) -> dict[int, str]:
        """What is still alive so long after the program itself has ended: nothing, it is hoped."""
        self.ended()
        until = time.monotonic() + patience_s
        while (left := self.alive()) and time.monotonic() < until:
            time.sleep(0.05)
        return left


def wait_until(true, patience_s: float = 300.0, every_s: float = 0.002) -> bool:
    """Poll until `true()`, or for so long -> what it said last."""
    until = time.monotonic() + patience_s
    while not (value := true()) and time.monotonic() < until:
        time.sleep(every_s)
    return value

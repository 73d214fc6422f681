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


class Program:
    """`python ARGS`, with its own mark; the test's end (conftest.py) ends it, too."""

    started: ClassVar[list["Program"]] = []

    def __init__(self, *args, log: Path, env: dict[str, str] | None = None):
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.log = log
        self.started.append(self)
        with log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, args)],
                cwd=ROOT,
                stdout=out,
                stderr=out,
                env={**os.environ, **PROGRAM_ENV, **(env or {}), "GSPO_TEST_MARK": self.mark},
            )

    def alive(self) -> dict[int, str]:
        """{pid: command line} of everything with our mark; zombies have no environment any more."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"GSPO_TEST_MARK={self.mark}".encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def orphans(self, patience_s: float = 60.0) -> dict[int, str]:
        """What is still alive so long after the program itself has ended: nothing, it is hoped."""
        self.process.wait()
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

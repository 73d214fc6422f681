"""Run a tracker of another package in a process of its own: training waits for none of its calls.

The trainer's side is `TrackerProcess`; `main` is the process. They speak in lines of JSON: a request, and its answer,
which is "" or why the request failed.
"""

import dataclasses
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gspo.config import Config, to_dict
from gspo.metrics.tracker_packages import PACKAGES, PackageTracker
from gspo.metrics.trackers import Tracker
from gspo.system.console import say

ROOT = Path(__file__).resolve().parent.parent.parent
OPEN_S = 120.0  # how long it may take to import a package and open a run
CALL_S = 30.0  # how long any later request may take, and all that are left at the end of the run


class TrackerProcess(Tracker):
    """A package's tracker, from the trainer's side. When it fails or hangs, one line says so and it is left out."""

    def __init__(self, package: str, folder: Path, cfg: Config, start_step: int):
        self.package, self.requests = package, queue.SimpleQueue()
        self.over, self.failure = False, ""
        self.limit, self.asked = OPEN_S, time.monotonic()  # of the request under way; None between two
        if importlib.util.find_spec(package) is None:
            self.process = None
            return self._leave_out(f"is not installed (pip install {package})")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gspo.metrics.tracker_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # it gets no Ctrl-C, and is killed with all that it starts
            env=environment,
        )
        self._ask(package=package, folder=str(folder), start_step=start_step, config=to_dict(cfg))
        self.sender = threading.Thread(target=self._send, daemon=True)
        self.sender.start()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Send the metrics of a step, without waiting until they have arrived."""
        self._ask(step=step, values=values)
        self._look()

    def close(self) -> None:
        """Wait until all requests are answered, CALL_S at most."""
        self._ask(close=True)
        until = time.monotonic() + max(CALL_S, self.limit)
        while not self.over and self.sender.is_alive():
            self.sender.join(0.05)
            self._look()
            if time.monotonic() > until and not self.over:
                self._leave_out(f"has not taken the last curves within {CALL_S:g} s of the end")
        self._look()
        self._end()

    def _ask(self, **request: Any) -> None:
        if not self.over:
            self.requests.put(request)

    def _send(self) -> None:
        """Send the requests one after the other, each when the one before has been answered (a thread of its own)."""
        closes = False
        while not (closes or self.failure):
            request = self.requests.get()
            closes = "close" in request
            self.asked = time.monotonic()
            try:
                self.process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
                self.process.stdin.flush()
                self.failure = json.loads(self.process.stdout.readline())
            except (OSError, ValueError):
                self.failure = "its process has ended"
            self.asked, self.limit = None, CALL_S

    def _look(self) -> None:
        """Leave the tracker out where a request has failed, or has had no answer for too long."""
        if self.over:
            return
        asked = self.asked
        if self.failure:
            self._leave_out(f"failed ({self.failure})")
        elif asked is not None and time.monotonic() - asked > self.limit:
            self._leave_out(f"has not answered for {self.limit:g} s")

    def _leave_out(self, why: str) -> None:
        self.over = True
        say(f"warning: trainer.trackers: {self.package} {why}; training goes on without it.")
        self._end()

    def _end(self) -> None:
        """End the process: by itself where it was closed, else with all that it has started."""
        if self.process is None:
            return
        if not self.over:
            with suppress(OSError):
                self.process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(CALL_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.over = True


def main() -> None:
    """Answer the requests on standard input. What the package prints goes to standard error, and it can ask nobody."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    tracker: PackageTracker | None = None
    for line in requests:
        failure = ""
        try:
            tracker = answer(json.loads(line), tracker)
        except (Exception, SystemExit) as e:
            failure = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        with suppress(OSError):  # nobody reads
            print(json.dumps(failure), file=answers, flush=True)
    if tracker is not None:  # the trainer has ended without closing it
        tracker.close()


def answer(request: dict[str, Any], tracker: PackageTracker | None) -> PackageTracker | None:
    """Do what a request asks; return the tracker for the next one, None once it is closed."""
    if "package" in request:
        return PACKAGES[request["package"]](
            Path(request["folder"]), config_of(request["config"]), request["start_step"]
        )
    assert tracker is not None
    if "close" in request:
        tracker.close()
        return None
    tracker.metrics(request["step"], request["values"])
    return tracker


def config_of(tree: dict[str, dict[str, Any]]) -> Config:
    """Return the configuration that `to_dict` made this of."""
    return Config(**{section.name: section.type(**tree[section.name]) for section in dataclasses.fields(Config)})


if __name__ == "__main__":
    main()

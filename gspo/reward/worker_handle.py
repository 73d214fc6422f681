"""Run one worker process, seen from the trainer: start it, send it calls, read its replies, end it.

The function that it calls may hang, raise, print without end, eat memory or end its process.
"""

import contextlib
import json
import os
import pickle
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gspo.errors import UserError
from gspo.reward import guardian
from gspo.reward.channel import Channel

HELLO = {"scores_groups", "concurrent", "keywords", "required"}  # what a worker says of the function
ROOT = str(Path(__file__).resolve().parents[2])
START_S = 120.0  # time limit for the imports of the user's file
SLOW_START_S = 5.0  # of them, after which a line says what is waited for
SECRETS = ("*_TOKEN", "*_KEY", "*_SECRET", "*PASSWORD*", "*_CREDENTIALS", "TOKEN", "SECRET")
LONGEST_REPLY = 2**26  # bytes; a longer one is no reply of ours
END_S = 15.0  # for the guardian to end what a function has started, before it is killed itself
GRACE_S = 1.0  # an async call has a time limit in the worker, which must come first


@dataclass(frozen=True)
class Settings:
    """The settings of a worker process."""

    path: str  # the user's file, absolute
    name: str  # the function in it
    timeout_s: float = 10.0
    memory_gib: float = 4.0  # 0: no limit
    concurrency: int = 16  # calls at the same time in one process, for async functions
    imports: tuple[str, ...] = ()  # modules to import before the first call, outside its time limit
    env: tuple[str, ...] = ()  # environment variables that it gets although they look like secrets
    warm_up: dict[str, Any] | None = None  # arguments of a call made with the imports: a library's first one is slow
    allow_ranking: bool = False  # call the file's `rank_responses`, if there is one, instead of the function
    default_ranking: str = ""  # source text of one that is not called, as it only sorts scores of the function
    range: tuple[float, ...] = ()  # lowest and highest reward; (): any finite number


@dataclass(frozen=True)
class Outcome:
    """The reply to a call, or why there is none: `fault` is "" | "error" | "timeout"."""

    reply: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    kind: str = ""  # of several faults of one kind, the first is reported
    message: str = ""  # `raised ValueError: ... (line 3)`
    trace: str = ""
    died: bool = False  # its process ended during the call, by itself


class WorkerEnded(Exception):
    """The worker process has ended, or was ended because a call timed out (`fault` == "timeout")."""

    def __init__(self, fault: str, kind: str, message: str, died: bool = False):
        super().__init__(message)
        self.outcome = Outcome(fault=fault, kind=kind, message=message, died=died)


class WorkerProcess:
    """One worker process. Raises UserError where it does not start. `first`: it says so where its imports take long."""

    def __init__(self, settings: Settings, source: str, on_print: Callable[[str], None], first: bool = False):
        self.settings, self.on_print = settings, lambda text: None  # nothing is shown before it has started
        self._start_process()
        hello = self._start_function(source, on_print if first else None)
        self.on_print = on_print
        if self.tail:
            on_print(self.tail)
        # What the function is: `rank_responses`? async? the keywords it takes (None: any), those it cannot do without.
        self.scores_groups, self.concurrent = hello["scores_groups"], hello["concurrent"]
        self.keywords, self.required = hello["keywords"], hello["required"]
        self.has_function = hello["has_function"]  # beside `rank_responses`

    def _start_process(self) -> None:
        """Start the process, with a socket for calls and replies and a pipe for what it prints. May raise OSError."""
        ours, theirs = socket.socketpair()
        self.tail = ""  # the last 4,000 characters printed
        try:
            self.output, write_end = os.pipe()
        except OSError:
            ours.close()
            theirs.close()
            raise
        self.channel = Channel(ours, LONGEST_REPLY)
        os.set_blocking(self.output, False)
        self.ready = select.poll()
        for end in (ours, self.output):
            self.ready.register(end, select.POLLIN)
        hidden = withheld(self.settings.env)
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment["PYTHONPATH"] = os.pathsep.join([ROOT, *_entries("PYTHONPATH")])
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gspo.reward.worker_main", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # it gets no Ctrl-C, and is killed with all that it starts
                env=environment,
            )
        except BaseException:  # no file descriptor or no process left
            ours.close()
            os.close(self.output)
            raise
        finally:
            theirs.close()
            os.close(write_end)

    def _start_function(self, source: str, on_slow: Callable[[str], None] | None) -> dict[str, Any]:
        """Have the user's file imported; return what the worker says of the function. Raise UserError."""
        settings = self.settings
        try:
            self.channel.send(pickle.dumps({**vars(settings), "source": source}))
            until = time.monotonic() + START_S
            hello = self.receive(until, SLOW_START_S if on_slow else None)
            if hello is None:
                on_slow(f"(its file {settings.path} is still being imported after {SLOW_START_S:g} s of {START_S:g})\n")
                hello = self.receive(until)
            if not hello.keys() >= HELLO and not isinstance(hello.get("refused"), str):
                raise self.end_garbled("no greeting of ours")
        except (WorkerEnded, OSError) as e:
            self.end()
            if isinstance(e, WorkerEnded) and e.outcome.fault == "timeout":
                place = e.outcome.kind.removeprefix("timeout")
                raise UserError(f"{settings.path} is still being imported after {START_S:g} s{place}.") from e
            last_words = f": {self.tail.strip().splitlines()[-1][:200]}" if self.tail.strip() else ""
            limit = f" (reward.memory_gib = {settings.memory_gib:g})" if 0 < settings.memory_gib < 0.5 else ""
            raise UserError(f"{settings.path}: importing it {e}{limit}{last_words}.") from e
        if "refused" in hello:
            self.end()
            raise UserError(hello["refused"])
        return hello

    def send(self, index: int, arguments: bytes) -> None:
        """Send a call, its arguments pickled. Raise WorkerEnded where the process is too busy to read; `receive` finds
        one that has died."""
        self.channel.sock.settimeout(self.settings.timeout_s + GRACE_S)
        try:
            self.channel.send(pickle.dumps((index, arguments)))
        except TimeoutError:
            raise self.end_overdue() from None
        except OSError:
            pass  # replies to earlier calls may still be there to read

    def receive(self, deadline: float, poll: float | None = None) -> dict[str, Any] | None:
        """Return the next reply, or None after `poll` seconds. Raise WorkerEnded at its end or the deadline."""
        until = min(deadline, time.monotonic() + poll) if poll else deadline
        while (reply := self.next_reply()) is None:
            left = until - time.monotonic()
            ready = {fd for fd, _ in self.ready.poll(max(0.0, 1000 * left))}
            if left <= 0 and self.channel.sock.fileno() not in ready:
                if until < deadline:
                    return None
                raise self.end_overdue()
            if self.output in ready:
                self.read_output()
            if self.channel.sock.fileno() in ready:
                try:
                    alive = self.channel.fill()
                except OSError:
                    alive = False
                if not alive:
                    raise self.collect_dead()
        return reply

    def next_reply(self) -> dict[str, Any] | None:
        """Return the next reply if it has arrived. Raise WorkerEnded where the function wrote to the channel itself."""
        try:
            message = self.channel.next()
            reply = None if message is None else json.loads(message)
        except (ValueError, RecursionError) as e:
            raise self.end_garbled(f"{type(e).__name__}: {e}"[:100]) from e
        if message is not None and not isinstance(reply, dict):
            raise self.end_garbled(f"a {type(reply).__name__}")
        return reply

    def end_garbled(self, what: str) -> WorkerEnded:
        """End a process that wrote what is no reply, and return the error to raise."""
        self.end()
        return WorkerEnded("error", "garbled", f"wrote to the file descriptor that its replies go through ({what})")

    def read_output(self, show: bool = True) -> bool:
        """Pass on what the process printed. Return whether there was anything to read."""
        try:
            data = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return False
        text = data.decode("utf-8", "replace")
        self.tail = (self.tail + text)[-4000:]
        if show:
            self.on_print(text)
        return bool(data)

    def end_overdue(self) -> WorkerEnded:
        """Ask the process which line it is in, end it, and return the error to raise."""
        place = ""
        with contextlib.suppress(OSError):
            os.kill(self.process.pid, signal.SIGUSR2)
            self.tail, until = "", time.monotonic() + 0.5
            while time.monotonic() < until and "in <module>" not in self.tail:
                self.ready.poll(50)
                self.read_output(show=False)
            lines = re.findall(re.escape(f'File "{self.settings.path}", line ') + r"(\d+)", self.tail)
            place = f" (line {lines[0]})" if lines else ""
        self.end()
        return WorkerEnded("timeout", f"timeout{place}", f"took longer than {self.settings.timeout_s:g} s{place}")

    def collect_dead(self) -> WorkerEnded:
        """Read the last output of a dead process, clean up, and return the error to raise."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        for _ in range(64):
            if not self.read_output():
                break
        code = self.process.poll()
        self.end()
        if code is not None and code < 0:
            how = f"ended its process by {signal.Signals(-code).name}"
        else:
            how = f"ended its process with exit code {code}"
        return WorkerEnded("error", how, how, died=True)

    def end(self) -> None:
        """Kill the process and all that it started; leave no zombie and no open file."""
        if self.output < 0:
            return
        self.ask_to_end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S if guardian.available() else 0.0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.channel.sock.close()
        os.close(self.output)
        self.output = -1

    def ask_to_end(self) -> None:
        """Have the process end, with all that it started, without waiting for that; from any thread."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if guardian.available():
                self.process.send_signal(signal.SIGTERM)  # to the guardian
            else:
                os.killpg(self.process.pid, signal.SIGKILL)


def withheld(keep: Sequence[str]) -> list[str]:
    """Return the names of the environment's secrets that a worker does not get, by their spelling."""
    secret = (any(fnmatchcase(name.upper(), pattern) for pattern in SECRETS) for name in os.environ)
    return sorted(name for name, is_secret in zip(os.environ, secret, strict=True) if is_secret and name not in keep)


def _entries(variable: str) -> list[str]:
    """Return an environment variable as a list, empty where it is not set."""
    return [os.environ[variable]] if os.environ.get(variable) else []

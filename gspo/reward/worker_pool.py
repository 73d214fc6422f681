"""Processes that call a function which may hang, raise, print without end, eat memory or take its process with it.

One thread per process gives it calls, waits for replies and, where a call costs the process its life, blames that
call, starts another process and goes on with the rest. Nothing here knows of rewards beyond the worker it starts.
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
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gspo.errors import UserError
from gspo.reward.channel import Channel

GAVE_UP = "gave up"  # the kind of fault of calls that were never made
ROOT = str(Path(__file__).resolve().parents[2])
START_S = 120.0  # for the imports of the user's file
GRACE_S = 1.0  # an async call's own time limit comes first
LONGEST_CHUNK = 16  # calls sent at once: a message costs about as much as a short call
PATIENCE = 32
POLL_S = 0.02  # how soon an async worker with room hears of new calls


@dataclass(frozen=True)
class Settings:
    """What a worker process is told when it starts."""

    path: str  # the file, absolute
    name: str  # the function
    timeout_s: float = 10.0
    memory_gib: float = 4.0  # 0: no limit
    concurrency: int = 16  # calls at a time in one process, for async functions
    imports: tuple[str, ...] = ()  # modules to import before the first call, outside its time limit
    groups: bool = False  # whether a `rank_responses` in the file goes before the function
    default_ranking: str = ""  # the text of one that does not: it only ranks what the function scores


@dataclass(frozen=True)
class Outcome:
    """A reply, or why there is none: `fault` is "" | "error" | "timeout"."""

    reply: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    kind: str = ""  # faults of one kind are reported once
    said: str = ""  # `raised ValueError: ... (line 3)`
    trace: str = ""


@dataclass
class Call:
    arguments: dict[str, Any]
    future: Future
    alone: bool = False  # it was running when its process died: the next death is its own
    sent: float = 0.0


class Gone(Exception):
    """The worker process has ended, or was ended because a call took too long (`fault` == "timeout")."""

    def __init__(self, fault: str, kind: str, said: str):
        super().__init__(said)
        self.outcome = Outcome(fault=fault, kind=kind, said=said)


class Process:
    """One worker process, seen from the trainer."""

    def __init__(self, settings: Settings, source: str, printed: Callable[[str], None]):
        self.settings, self.printed = settings, lambda text: None  # until it has started well
        ours, theirs = socket.socketpair()
        self.channel, self.tail = Channel(ours), ""
        self.output, write_end = os.pipe()
        os.set_blocking(self.output, False)
        self.ready = select.poll()
        for end in (ours, self.output):
            self.ready.register(end, select.POLLIN)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, *_entries("PYTHONPATH")])}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gspo.reward.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # it gets no Ctrl-C, and is killed together with what it starts
                env=environment,
            )
        finally:
            theirs.close()
            os.close(write_end)
        try:
            self.channel.send(pickle.dumps({**vars(settings), "source": source}))
            hello = self.receive(time.monotonic() + START_S)
        except (Gone, OSError) as e:
            self.end()
            if isinstance(e, Gone) and e.outcome.fault == "timeout":
                place = e.outcome.kind.removeprefix("timeout")
                raise UserError(f"{settings.path} is still being imported after {START_S:g} s{place}.") from e
            last_words = f": {self.tail.strip().splitlines()[-1][:200]}" if self.tail.strip() else ""
            limit = f" (reward.memory_gib = {settings.memory_gib:g})" if 0 < settings.memory_gib < 0.5 else ""
            raise UserError(f"{settings.path}: importing it {e}{limit}{last_words}.") from e
        if "refused" in hello:
            self.end()
            raise UserError(hello["refused"])
        self.printed = printed
        if self.tail:
            printed(self.tail)
        self.ranks, self.concurrent, self.takes = hello["ranks"], hello["concurrent"], hello["takes"]

    def send(self, index: int, arguments: dict[str, Any]) -> None:
        """Hand over a call; Gone if the process is too busy to read. One that has ended shows when its replies do."""
        self.channel.sock.settimeout(self.settings.timeout_s + GRACE_S)
        try:
            self.channel.send(pickle.dumps((index, arguments)))
        except TimeoutError:
            raise self.too_late() from None
        except OSError:
            pass  # replies to earlier calls may still be there to read

    def receive(self, deadline: float, poll: float | None = None) -> dict[str, Any] | None:
        """The next reply; None after `poll` seconds without one; Gone when the process ended or the time is over."""
        until = min(deadline, time.monotonic() + poll) if poll else deadline
        while (message := self.channel.next()) is None:
            left = until - time.monotonic()
            ready = {fd for fd, _ in self.ready.poll(max(0.0, 1000 * left))}
            if left <= 0 and self.channel.sock.fileno() not in ready:
                if until < deadline:
                    return None
                raise self.too_late()
            if self.output in ready:
                self.read_output()
            if self.channel.sock.fileno() in ready:
                try:
                    alive = self.channel.fill()
                except OSError:
                    alive = False
                if not alive:
                    raise self.died()
        return json.loads(message)

    def read_output(self, show: bool = True) -> bool:
        """Pass on what was printed; False when there was nothing to read."""
        try:
            data = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return False
        text = data.decode("utf-8", "replace")
        self.tail = (self.tail + text)[-4000:]
        if show:
            self.printed(text)
        return bool(data)

    def too_late(self) -> Gone:
        """Ask where the call is, then end the process."""
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
        return Gone("timeout", f"timeout{place}", f"took longer than {self.settings.timeout_s:g} s{place}")

    def died(self) -> Gone:
        """Collect the dead process and its last words."""
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
        return Gone("error", how, how)

    def end(self) -> None:
        """Kill the process and all that it started; leave no zombie and no open file."""
        if self.output < 0:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.channel.sock.close()
        os.close(self.output)
        self.output = -1


class Pool:
    """`workers` processes and the calls that wait for them. The first starts at once, to hear of a file's mistakes."""

    def __init__(self, settings: Settings, workers: int, printed: Callable[[str], None] = lambda text: None):
        self.settings, self.workers, self.printed = settings, workers, printed
        try:
            self.source = Path(settings.path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"reward.path = {settings.path!r} cannot be read: {e}.") from e
        self.queue: deque[Call] = deque()
        self.news, self.closing = threading.Condition(), False
        self.keepers: list[Keeper] = []
        self.call_s, self.calls = 0.0, 0  # seconds a call, lately; calls so far
        self.patience, self.hung = PATIENCE, 0  # calls in a row that may take too long; that did
        self.first: Process | None = self.start()
        self.ranks, self.concurrent, self.takes = self.first.ranks, self.first.concurrent, self.first.takes

    def start(self) -> Process:
        """A process, ready for calls; UserError when the file does not import."""
        return Process(self.settings, self.source, self.printed)

    def submit(self, arguments: dict[str, Any]) -> "Future[Outcome]":
        """Queue one call, by keywords. Its future has a result whatever the call does."""
        call = Call(arguments, Future())
        with self.news:
            assert not self.closing
            self.queue.append(call)
            if len(self.keepers) < self.workers:
                self.keepers.append(Keeper(self, self.first))
                self.first = None
                self.keepers[-1].start()
            self.news.notify()
        return call.future

    def take(self, most: Callable[[int], int], wait: bool, alone: bool) -> list[Call]:
        """Up to `most(waiting)` calls from the queue; one that must be `alone` comes only by itself."""
        with self.news:
            while wait and not self.queue and not self.closing:
                self.news.wait()
            taken: list[Call] = []
            count = 0 if self.closing else min(most(len(self.queue)), len(self.queue))
            while len(taken) < count:
                if self.queue[0].alone and (taken or not alone):
                    break
                taken.append(self.queue.popleft())
                if taken[-1].alone:
                    break
            return taken

    def timed(self, seconds: float) -> None:
        """Take one call's duration into the running mean (no lock: an estimate is all it is)."""
        self.calls += 1
        self.call_s += max(0.05, 1.0 / self.calls) * (seconds - self.call_s)

    def settle(self, call: Call, outcome: Outcome) -> None:
        """Give a call its outcome. After too many time-outs in a row the calls that wait are not made any more."""
        call.future.set_result(outcome)
        with self.news:
            self.hung = self.hung + 1 if outcome.fault == "timeout" else 0
            if self.hung < self.patience:
                return
            self.hung, waiting = 0, list(self.queue)
            self.queue.clear()
        said = f"was given up after {self.patience} calls in a row that {outcome.said}"
        for other in waiting:
            other.future.set_result(Outcome(fault="timeout", kind=GAVE_UP, said=said))

    def put_back(self, calls: list[Call]) -> None:
        """Calls that another one's end interrupted, to the front."""
        with self.news:
            for call in calls if self.closing else []:
                call.future.cancel()
            self.queue.extendleft([] if self.closing else reversed(calls))
            self.news.notify_all()

    def close(self) -> None:
        """End all processes; calls that are still waiting are cancelled."""
        with self.news:
            self.closing = True
            for call in self.queue:
                call.future.cancel()
            self.queue.clear()
            self.news.notify_all()
        if self.first:
            self.first.end()
        for keeper in self.keepers:
            keeper.stop()


class Keeper(threading.Thread):
    """Keeps one process busy, and replaces it."""

    def __init__(self, pool: Pool, process: Process | None):
        super().__init__(name="reward", daemon=True)
        self.pool, self.process = pool, process
        self.running: dict[int, Call] = {}  # in the order sent; without concurrency the first is the one at work
        self.sent, self.since = 0, 0.0

    def run(self) -> None:
        while not self.pool.closing:
            calls = self.pool.take(self._room, wait=not self.running, alone=not self.running)
            try:
                self._send(calls)
                self._receive()
            except Gone as gone:
                self._blame(gone)
            except UserError as e:  # a replacement that does not start
                for call in calls:
                    call.future.set_result(Outcome(fault="error", kind="start", said=f"was not called: {e}"))
        if self.process:
            self.process.end()

    def stop(self) -> None:
        if self.process and self.ident != threading.get_ident():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.process.pid, signal.SIGKILL)  # its thread is waiting for a reply
        self.join(5.0)

    def _room(self, waiting: int) -> int:
        """How many more calls this process should be given."""
        if any(call.alone for call in self.running.values()):
            return 0
        if self.pool.concurrent:
            return self.pool.settings.concurrency - len(self.running)
        if len(self.running) > 1:
            return 0
        # Fewer towards the end, so that all processes end together.
        return min(LONGEST_CHUNK, max(1, waiting // (4 * self.pool.workers)))

    def _send(self, calls: list[Call]) -> None:
        if calls and not self.running and self.process and self.process.process.poll() is not None:
            self.process.end()  # it ended between two calls, which is none of theirs
            self.process = None
        if calls and self.process is None:
            self.process = self.pool.start()
        if not self.running:
            self.since = time.monotonic()
        for call in calls:
            self.sent += 1
            self.running[self.sent] = call
            call.sent = time.monotonic()
        for index in list(self.running)[len(self.running) - len(calls) :]:
            self.process.send(index, self.running[index].arguments)

    def _receive(self) -> None:
        """Wait for one reply; in an async process with room, not for long."""
        if not self.running:
            return
        limit, poll = self.pool.settings.timeout_s, None
        deadline = self.since + limit
        if self.pool.concurrent:
            deadline = next(iter(self.running.values())).sent + limit + GRACE_S
            poll = POLL_S if self._room(0) > 0 else None
        reply = self.process.receive(deadline, poll)
        if reply is None:
            return
        now = time.monotonic()
        self.pool.timed(now - self.since)
        self.since = now
        self._deliver(self.running.pop(reply["index"]), reply)
        if reply.get("last"):
            self._restart(list(self.running.values()))

    def _deliver(self, call: Call, reply: dict[str, Any]) -> None:
        if "timeout" in reply:
            limit = self.pool.settings.timeout_s
            outcome = Outcome(fault="timeout", kind="timeout", said=f"took longer than {limit:g} s")
        elif "fault" in reply:
            outcome = Outcome(fault="error", **reply["fault"])
        else:
            outcome = Outcome(reply)
        self.pool.settle(call, outcome)

    def _blame(self, gone: Gone) -> None:
        """The process is lost: one call is the cause, the others are called again.

        A hang is the fault of the call at work. A death is laid to a call that dies in a new process, too, alone:
        it may have been the kernel's choice, or an earlier call's doing.
        """
        calls = list(self.running.values())
        suspects = calls if self.pool.concurrent else calls[:1]
        if suspects and not self.pool.closing:
            if suspects[0].alone or (gone.outcome.fault == "timeout" and len(suspects) == 1):
                self.pool.settle(suspects[0], gone.outcome)
                calls.remove(suspects[0])
            for call in suspects:
                call.alone = True
        self._restart(calls)

    def _restart(self, calls: list[Call]) -> None:
        self.running.clear()
        self.process.end()
        self.process = None
        self.pool.put_back(calls)


def _entries(variable: str) -> list[str]:
    return [os.environ[variable]] if os.environ.get(variable) else []

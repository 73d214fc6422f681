"""Call a function that may hang, crash or fill its process; every call gets an outcome.

One thread per process sends calls, waits for replies and, where a call costs the process its life, finds out which one
it was, starts another process and goes on with the rest. Nothing here knows of rewards beyond the worker it starts.
"""

import contextlib
import math
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo.errors import UserError
from gspo.reward.channel import is_reward
from gspo.reward.worker_handle import GRACE_S, Outcome, Settings, WorkerEnded, WorkerProcess

GAVE_UP = "gave up"  # the kind of fault of calls that were never made
LONGEST_CHUNK = 16  # calls sent at once: a message costs about as much as a short call
MOST_TIMEOUTS = 32  # calls in a row that may time out
POLL_S = 0.02  # how soon an async worker with room is given new calls
PAUSES_S = (0.1, 0.5, 2.0)  # before a process is started again that the system did not let start
NO_PROCESS = "raise `ulimit -n` (files) or `ulimit -u` (processes), or lower reward.workers"


@dataclass
class Call:
    """A call that waits or runs."""

    arguments: bytes  # pickled by the caller: what cannot be sent is found there
    future: Future
    alone: bool = False  # it was running when its process died; it now runs alone, so that another death is its fault
    sent: float = 0.0  # time.monotonic()


class WorkerPool:
    """Keep `workers` processes busy with the calls that wait. The first starts at once, to check the file.

    With `spare`, one more process waits, ready to take the place of one that ends.
    """

    def __init__(
        self,
        settings: Settings,
        workers: int,
        on_print: Callable[[str], None] = lambda text: None,
        spare: bool = False,
    ):
        self.timeout_s = settings.timeout_s  # of a call; may be changed between calls
        self.keep_spare, self.spare = spare, None
        self.settings, self.workers, self.on_print = settings, workers, on_print
        try:
            self.source = Path(settings.path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"reward.path = {settings.path!r} cannot be read: {e}.") from e
        self.queue: deque[Call] = deque()
        self.changed, self.closing = threading.Condition(), False
        self.threads: list[WorkerThread] = []
        self.mean_call_s, self.calls = 0.0, 0  # running mean of a call's seconds; calls so far
        self.most_timeouts, self.timeouts_in_a_row = MOST_TIMEOUTS, 0
        self.most_deaths, self.deaths_in_a_row = math.inf, 0
        try:
            first = self.start(first=True)
        except OSError as e:
            raise UserError(f"no process for the reward function can be started ({e}): {NO_PROCESS}.") from e
        self.first: WorkerProcess | None = first  # until the first call
        self.scores_groups, self.concurrent = first.scores_groups, first.concurrent
        self.keywords, self.required, self.has_function = first.keywords, first.required, first.has_function

    def start(self, first: bool = False) -> WorkerProcess:
        """Return a new process, or the spare one. Raise UserError where it cannot import the file; OSError."""
        with self.changed:
            spare, self.spare = self.spare, None
        process = spare and spare.take()
        if process is None:
            process = WorkerProcess(self.settings, self.source, self.on_print, first)
        with self.changed:
            if self.keep_spare and not (self.spare or self.closing):
                self.spare = Spare(self)
                self.spare.start()
        return process

    def submit(self, arguments: dict[str, Any]) -> "Future[Outcome]":
        """Queue a call with these keyword arguments; its future gets a result whatever the call does."""
        call = Call(b"", Future())
        try:
            call.arguments = pickle.dumps(arguments)
        except Exception as e:  # nested too deeply, an object that has no pickle
            message = f"was not called: its arguments cannot be sent ({type(e).__name__}: {e})"
            call.future.set_result(Outcome(fault="error", kind="arguments", message=message))
            return call.future
        with self.changed:
            assert not self.closing
            self.queue.append(call)
            if len(self.threads) < self.workers:
                self.threads.append(WorkerThread(self, self.first))
                self.first = None
                self.threads[-1].start()
            self.changed.notify()
        return call.future

    def take(self, room: Callable[[int], int], wait: bool, idle: bool) -> list[Call]:
        """Take up to `room(len(queue))` calls from the queue. One that must run alone is taken by itself, by an idle
        worker."""
        with self.changed:
            while wait and not self.queue and not self.closing:
                self.changed.wait()
            taken: list[Call] = []
            count = 0 if self.closing else min(room(len(self.queue)), len(self.queue))
            while len(taken) < count:
                if self.queue[0].alone and (taken or not idle):
                    break
                taken.append(self.queue.popleft())
                if taken[-1].alone:
                    break
            return taken

    def record_duration(self, seconds: float) -> None:
        """Update the running mean of a call's seconds, without a lock: it is an estimate."""
        self.calls += 1
        self.mean_call_s += max(0.05, 1.0 / self.calls) * (seconds - self.mean_call_s)

    def finish(self, call: Call, outcome: Outcome) -> None:
        """Give a call its outcome. After `most_timeouts` timeouts in a row, or `most_deaths` calls in a row that ended
        their process, give up the calls that wait."""
        call.future.set_result(outcome)
        with self.changed:
            self.timeouts_in_a_row = self.timeouts_in_a_row + 1 if outcome.fault == "timeout" else 0
            self.deaths_in_a_row = self.deaths_in_a_row + 1 if outcome.died else 0
            if self.timeouts_in_a_row < self.most_timeouts and self.deaths_in_a_row < self.most_deaths:
                return
            count = max(self.timeouts_in_a_row, self.deaths_in_a_row)
            self.timeouts_in_a_row = self.deaths_in_a_row = 0
        message = f"was given up after {count} calls in a row that {outcome.message}"
        self.give_up([], Outcome(fault=outcome.fault, kind=GAVE_UP, message=message))

    def give_up(self, calls: list[Call], outcome: Outcome) -> None:
        """Settle these calls and all that wait."""
        with self.changed:
            calls = [*calls, *self.queue]
            self.queue.clear()
        for call in calls:
            call.future.set_result(outcome)

    def retire(self, thread: "WorkerThread", calls: list[Call], error: OSError) -> None:
        """Go on without a thread whose process cannot be started; without the last one, give up the calls."""
        with self.changed:
            self.threads.remove(thread)
            if self.threads:
                self.workers = len(self.threads)
        self.put_back(calls)
        if self.threads:
            self.on_print(f"{len(self.threads)} worker processes instead of one more ({error}): {NO_PROCESS}\n")
            return
        message = f"was not called: no process can be started ({error}): {NO_PROCESS}"
        self.give_up([], Outcome(fault="error", kind=GAVE_UP, message=message))

    def put_back(self, calls: list[Call]) -> None:
        """Put calls that the end of their process interrupted back to the front of the queue."""
        with self.changed:
            for call in calls if self.closing else []:
                call.future.cancel()
            self.queue.extendleft([] if self.closing else reversed(calls))
            self.changed.notify_all()

    def close(self) -> None:
        """End all processes and cancel the calls that wait."""
        with self.changed:
            self.closing = True
            for call in self.queue:
                call.future.cancel()
            self.queue.clear()
            self.changed.notify_all()
            spare, self.spare = self.spare, None
        if spare:
            spare.end()
        if self.first:
            self.first.end()
        for thread in self.threads:
            thread.interrupt()
        for thread in self.threads:
            thread.join(5.0)


class Spare(threading.Thread):
    """Start a process in the background."""

    def __init__(self, pool: WorkerPool):
        super().__init__(name="spare reward", daemon=True)
        self.pool, self.process, self.dropped = pool, None, False

    def run(self) -> None:
        """Start the process; without room for it, or where it fails, there is none."""
        with contextlib.suppress(UserError, OSError):
            self.process = WorkerProcess(self.pool.settings, self.pool.source, self.pool.on_print)
        if self.dropped:
            self.end()

    def take(self) -> WorkerProcess | None:
        """Return the process as soon as it has started, if it lives."""
        self.join()
        if self.process and self.process.process.poll() is not None:
            self.end()
        return self.process

    def end(self) -> None:
        """End the process, now or when it has started."""
        self.dropped = True
        if self.process:
            self.process.end()
            self.process = None


class WorkerThread(threading.Thread):
    """Keep one process busy, and replace it when it ends."""

    def __init__(self, pool: WorkerPool, process: WorkerProcess | None):
        super().__init__(name="reward", daemon=True)
        self.pool, self.process = pool, process
        self.running: dict[int, Call] = {}  # in the order sent; without concurrency the first one is at work
        self.sent, self.started = 0, 0.0  # calls sent; when the one at work began

    def run(self) -> None:
        """Send calls and deliver their outcomes until the pool closes."""
        while not self.pool.closing:
            calls = self.pool.take(self._room, wait=not self.running, idle=not self.running)
            try:
                if calls and not self._has_process():
                    self.process = self._start()
                self._send(calls)
                self._receive()
            except WorkerEnded as ended:
                self._assign_fault(ended)
            except UserError as e:  # a replacement that does not start
                for call in calls:
                    call.future.set_result(Outcome(fault="error", kind="start", message=f"was not called: {e}"))
            except Exception as e:  # of whatever kind: every call gets an outcome, and the thread lives on
                if self.process is None:
                    return self.pool.retire(self, calls, e)
                self._assign_fault(WorkerEnded("error", type(e).__name__, f"could not be called: {e!r:.200}"))
        if self.process:
            self.process.end()

    def _has_process(self) -> bool:
        """Return whether the process lives. One that ended between two calls is cleaned up: no call is at fault."""
        if self.process and not self.running and self.process.process.poll() is not None:
            self.process.end()
            self.process = None
        return self.process is not None

    def _start(self) -> WorkerProcess:
        """Start a process; where the system has no room for it, try again after a while. May raise OSError."""
        for pause in PAUSES_S:
            try:
                return self.pool.start()
            except OSError:
                time.sleep(pause)
        return self.pool.start()

    def interrupt(self) -> None:
        """End the process: the thread may be waiting for its reply."""
        if process := self.process:
            process.ask_to_end()

    def _room(self, waiting: int) -> int:
        """Return how many more calls to send to this process."""
        if any(call.alone for call in self.running.values()):
            return 0
        if self.pool.concurrent:
            return self.pool.settings.concurrency - len(self.running)
        if len(self.running) > 1:
            return 0
        # Fewer when few are left, so that all processes finish at about the same time.
        return min(LONGEST_CHUNK, max(1, waiting // (4 * self.pool.workers)))

    def _send(self, calls: list[Call]) -> None:
        """Send calls to the process."""
        if not self.running:
            self.started = time.monotonic()
        for call in calls:
            self.sent += 1
            self.running[self.sent] = call
            call.sent = time.monotonic()
        for index in list(self.running)[len(self.running) - len(calls) :]:
            self.process.send(index, self.running[index].arguments)

    def _receive(self) -> None:
        """Wait for one reply and deliver it; where an async process has room for calls, wait POLL_S only."""
        if not self.running:
            return
        limit, poll = self.pool.timeout_s, None
        deadline = self.started + limit
        if self.pool.concurrent:
            deadline = next(iter(self.running.values())).sent + limit + GRACE_S
            poll = POLL_S if self._room(0) > 0 else None
        reply = self.process.receive(deadline, poll)
        if reply is None:
            return
        index = reply.get("index")
        if not isinstance(index, int) or index not in self.running:
            return  # not written by our code in the worker
        if not _is_complete(reply, self.pool.scores_groups, self.pool.settings.range):
            return  # nor this
        now = time.monotonic()
        self.pool.record_duration(now - self.started)
        self.started = now
        self._deliver(self.running.pop(index), reply)
        if reply.get("last"):
            self._restart(list(self.running.values()))

    def _deliver(self, call: Call, reply: dict[str, Any]) -> None:
        """Turn a reply into the outcome of its call."""
        if "timeout" in reply:
            limit = self.pool.timeout_s
            outcome = Outcome(fault="timeout", kind="timeout", message=f"took longer than {limit:g} s")
        elif "fault" in reply:
            outcome = Outcome(fault="error", **reply["fault"])
        else:
            outcome = Outcome(reply)
        self.pool.finish(call, outcome)

    def _assign_fault(self, ended: WorkerEnded) -> None:
        """Find the call that ended the process, and repeat the others.

        A timeout is the fault of the call at work. A death is the fault of a call that dies again, alone in a new
        process: the first time, the operating system may have ended it for memory, or an earlier call may be the cause.
        """
        calls = list(self.running.values())
        suspects = calls if self.pool.concurrent else calls[:1]
        if suspects and not self.pool.closing:
            if suspects[0].alone or (ended.outcome.fault == "timeout" and len(suspects) == 1):
                self.pool.finish(suspects[0], ended.outcome)
                calls.remove(suspects[0])
            for call in suspects:
                call.alone = True
        self._restart(calls)

    def _restart(self, calls: list[Call]) -> None:
        """End the process and queue its calls again."""
        self.running.clear()
        self.process.end()
        self.process = None
        self.pool.put_back(calls)


def _is_complete(reply: dict[str, Any], of_group: bool, limits: Sequence[float]) -> bool:
    """Return whether a reply holds what is read from it: a fault, a score with its parts, or those of a group."""
    if "timeout" in reply:
        return True
    fault = reply.get("fault")
    if fault is not None:
        wanted = {"kind", "message", "trace"}
        return isinstance(fault, dict) and fault.keys() == wanted and all(isinstance(x, str) for x in fault.values())
    if not of_group:
        return "scores" not in reply and _is_score(reply, limits)
    scores = reply.get("scores")
    return isinstance(scores, list) and all(_is_score(score, limits) for score in scores)


def _is_score(reply: Any, limits: Sequence[float]) -> bool:
    """Return whether a reply is a score with its parts and prediction, as the worker sends it."""
    if not isinstance(reply, dict) or not isinstance(reply.get("parts"), dict):
        return False
    are_numbers = all(isinstance(x, float) for x in reply["parts"].values())
    is_prediction = "pred" in reply and isinstance(reply["pred"], str | None)
    return are_numbers and is_reward(reply.get("score"), limits) and is_prediction

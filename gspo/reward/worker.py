"""The process in which a reward function runs. Standard library only, so that it starts in a blink.

The parent (worker_pool.py) speaks to it through a socket whose number is the only argument: first the settings, then
calls, as pickles; replies are JSON, because what ran here may have been a model's idea. What is printed goes to the
parent through a pipe. When the parent ends, however it ends, so does this process and whatever it started.
"""

import asyncio
import contextlib
import faulthandler
import importlib
import inspect
import json
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from queue import SimpleQueue
from types import ModuleType
from typing import Any

from gspo.reward.channel import Channel

BACKSTOP_S = 5.0  # an orphan that holds the interpreter's lock dies this long after the time limit


# ---- the user's file ----


def load(source: str, path: str) -> ModuleType:
    """The module of the text that the parent read once: editing the file does not change a run half-way."""
    sys.path.append(os.path.dirname(path))  # modules beside it
    module = ModuleType(f"user_reward_{os.path.splitext(os.path.basename(path))[0]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look themselves up
    exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
    return module


def where(error: BaseException, path: str) -> str:
    """`KeyError: 'x' (line 12)`: the error and the line of the user's file it came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    line = lines[-1] if lines else error.lineno if isinstance(error, SyntaxError) else None
    return f"{type(error).__name__}: {' '.join(said.split())}" + (f" (line {line})" if line else "")


def fault_of(error: BaseException, path: str) -> dict[str, str]:
    """What the parent is told of an exception: a kind to count it under, one line, and the user's part of the trace."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    place = f"{lines[-1].filename}:{lines[-1].lineno}" if lines else ""
    trace = "".join(traceback.format_list(lines[-8:])) + f"{type(error).__name__}: {str(error)[:500]}"
    return {"kind": f"{type(error).__name__} {place}", "said": f"raised {where(error, path)[:500]}", "trace": trace}


# ---- what a function returned ----


def number(value: Any) -> float | None:
    """A number of Python, numpy or torch as a float; None for anything else."""
    with contextlib.suppress(Exception):  # an array of several has no item(), 10**400 is no float
        value = value.item() if hasattr(value, "item") else value
        return float(value) if isinstance(value, int | float) else None
    return None


class NotAScoreError(ValueError):
    """The function returned what is no reward."""


def one_score(value: Any) -> dict[str, Any]:
    """A number, or a dict with `score` -> {"score", "parts", "pred"}. NotAScoreError for anything else."""
    is_dict = isinstance(value, dict)
    score = number(value.get("score") if is_dict else value)
    if score is None or not 0.0 <= score <= 1.0:
        raise NotAScoreError(
            f"returned {value!r:.60}; it must return a number from 0 to 1, or a dict whose 'score' is one"
        )
    parts = {str(k): x for k, v in value.items() if k != "score" and (x := number(v)) is not None} if is_dict else {}
    pred = value.get("pred") if is_dict else None
    return {"score": score, "parts": parts, "pred": None if pred is None else str(pred)}


def ranked_scores(value: Any, count: int) -> dict[str, Any]:
    """`rank_responses`' [(index, score), ...], each index once -> {"scores"}. NotAScoreError for anything else."""
    try:
        scores = {int(index): number(score) for index, score in value}
        complete = len(list(value)) == count and sorted(scores) == list(range(count))
    except (TypeError, ValueError):
        complete = False
    if not complete or not all(s is not None and 0.0 <= s <= 1.0 for s in scores.values()):
        raise NotAScoreError(
            f"returned {value!r:.120}; it must return (index, score from 0 to 1) for each of the {count} responses"
        )
    return {"scores": [scores[i] for i in range(count)]}


# ---- the process ----


class Worker:
    """Answers calls until the parent is gone."""

    def __init__(self, channel: Channel, settings: dict[str, Any]):
        self.channel, self.settings, self.path = channel, settings, settings["path"]
        self.requests: SimpleQueue[tuple[int, dict]] = SimpleQueue()
        self.arrived: Callable[[], None] | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while (message := self.channel.receive()) is not None:
                self.requests.put(pickle.loads(message))
                if self.arrived:
                    self.arrived()
        os.killpg(0, signal.SIGKILL)  # the parent is gone; this also ends what a reward function has started

    def tell(self, message: dict[str, Any]) -> None:
        self.channel.send(json.dumps(message).encode())

    def find(self) -> Callable[..., Any] | None:
        """The function to call; the parent hears what kind it is, or why there is none."""
        try:
            for name in self.settings["imports"]:
                importlib.import_module(name)
            module = load(self.settings["source"], self.path)
            ranks = getattr(module, "rank_responses", None) if self.settings["groups"] else None
            self.ranks = callable(ranks) and not self._is_the_default(ranks)
            function = ranks if self.ranks else getattr(module, self.settings["name"], None)
        except BaseException as e:  # sys.exit() in a module, too
            self.tell({"refused": f"{self.path} does not import: {where(e, self.path)}."})
            return None
        if not callable(function):
            there = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
            refused = f"{self.path} has no function {self.settings['name']!r} (reward.name); "
            refused += f"it has {', '.join(there)}." if there else "it has no function at all."
            self.tell({"refused": refused})
            return None
        # An object's `async def __call__` counts, too.
        self.concurrent = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
        self.tell({"ranks": self.ranks, "concurrent": self.concurrent, "takes": _keywords(function)})
        return function

    def _is_the_default(self, ranks: Callable[..., Any]) -> bool:
        """Our own `rank_responses`, or a copy, ranks by compute_score: then every response has a call of its own."""
        with contextlib.suppress(OSError, TypeError):
            return inspect.getsource(ranks) == self.settings["default_ranking"]
        return False

    def judge(self, value: Any, call: dict[str, Any]) -> dict[str, Any]:
        return ranked_scores(value, len(call["responses"])) if self.ranks else one_score(value)

    def faulty(self, error: BaseException) -> dict[str, Any]:
        if isinstance(error, NotAScoreError):
            return {"fault": {"kind": str(error)[:24], "said": str(error), "trace": ""}}
        told = {"fault": fault_of(error, self.path)}
        if isinstance(error, MemoryError):
            told["fault"]["said"] += f"; reward.memory_gib = {self.settings['memory_gib']:g} is the limit"
            told["last"] = True  # what it holds may be all there is: a new process is cheaper than a starved one
        return told

    def serve(self, function: Callable[..., Any]) -> None:
        """One call after another. A coroutine that a plain function returns is run to its end."""
        loop = None
        while True:
            index, call = self.requests.get()
            signal.setitimer(signal.ITIMER_REAL, self.settings["timeout_s"] + BACKSTOP_S)
            try:
                value = function(**call)
                if inspect.isawaitable(value):
                    loop = loop or asyncio.new_event_loop()
                    reply = loop.run_until_complete(self.awaited(value, call))
                else:
                    reply = self.judge(value, call)
            except BaseException as e:
                reply = self.faulty(e)
            value = None
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            self.reply(index, reply)

    async def awaited(self, value: Awaitable[Any], call: dict[str, Any]) -> dict[str, Any]:
        """The reply to a call that returned an awaitable, which is cancelled when the time is over."""

        async def judged() -> dict[str, Any]:
            try:
                return self.judge(await value, call)
            except BaseException as e:  # SystemExit would end the loop and every other call in it
                return self.faulty(e)

        task = asyncio.ensure_future(judged())
        done, _ = await asyncio.wait({task}, timeout=self.settings["timeout_s"])
        if not done:
            task.cancel()
            return {"timeout": ""}
        return task.result()

    async def serve_concurrently(self, function: Callable[..., Any]) -> None:
        """All calls that have arrived, at the same time."""
        loop, arrived, running = asyncio.get_running_loop(), asyncio.Event(), set()
        self.arrived = lambda: loop.call_soon_threadsafe(arrived.set)

        async def one(index: int, call: dict[str, Any]) -> None:
            try:
                reply = await self.awaited(function(**call), call)
            except Exception as e:  # called with names that it does not take
                reply = self.faulty(e)
            self.reply(index, reply)

        while True:
            while not self.requests.empty():
                task = loop.create_task(one(*self.requests.get()))
                running.add(task)
                task.add_done_callback(running.discard)
            await arrived.wait()
            arrived.clear()

    def reply(self, index: int, reply: dict[str, Any]) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        self.tell({"index": index, **reply})
        if reply.get("last"):
            os._exit(0)


def _keywords(function: Callable[..., Any]) -> list[str] | None:
    """The keywords that `function` takes; None when it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def limit_memory(gib: float) -> None:
    """Refuse this process more than so much; and let the kernel, if memory ends, choose it before the trainer."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        if gib:
            resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30), int(gib * 2**30)))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    first = channel.receive()
    if first is None:
        return
    settings = pickle.loads(first)
    faulthandler.enable()  # a segmentation fault tells its line
    faulthandler.register(signal.SIGUSR2, all_threads=False)  # so does a call that hangs, when asked
    limit_memory(settings["memory_gib"])
    worker = Worker(channel, settings)
    function = worker.find()
    if function is None:
        os._exit(0)
    if worker.concurrent:
        asyncio.run(worker.serve_concurrently(function))
    else:
        worker.serve(function)


if __name__ == "__main__":
    main()

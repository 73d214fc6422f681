"""Run a reward function in a process of its own. Standard library only, so that it starts fast.

The parent (worker_handle.py) sends through a socket, whose number is the only argument, first the settings, then
calls, as pickles. Replies are JSON and not pickles: code that ran here may have been written by a model. What is
printed goes to the parent through a pipe. When the parent ends, however it ends, so do this process and all that it
started (guardian.py).
"""

import asyncio
import contextlib
import faulthandler
import importlib.abc
import inspect
import json
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from importlib.machinery import ModuleSpec
from queue import SimpleQueue
from types import ModuleType
from typing import Any

from gspo.reward import guardian
from gspo.reward.channel import Channel, is_reward

BACKSTOP_S = 5.0  # a process without parent that holds the interpreter's lock dies this long after the time limit


# ---- the user's file ----


class UserModule(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import the user's file from the source text that the parent read once: editing it during a run changes nothing.

    Processes that the user's code starts (multiprocessing by spawn or forkserver) import it too: they find the text in
    a file without a name that this process holds open, and path and number of that file in the environment.
    """

    HELD = "GSPO_REWARD_SOURCE"  # environment variable: `/proc/PID/fd/N PATH`

    def __init__(self, source: str, path: str):
        self.source, self.path = source, path
        stem = os.path.splitext(os.path.basename(path))[0]
        self.name = f"user_reward_{stem.replace('.', '_')}"  # a dot would make a package of it

    def hold(self) -> None:
        """Keep the source text open for processes that this one starts."""
        held = os.memfd_create("user_reward")
        with open(held, "w", encoding="utf-8", closefd=False) as file:
            file.write(self.source)
        os.environ[self.HELD] = f"/proc/{os.getpid()}/fd/{held} {self.path}"

    @classmethod
    def held(cls) -> "UserModule | None":
        """Return what the process that started this one holds, if it does."""
        file, _, path = os.environ.get(cls.HELD, "").partition(" ")
        try:
            with open(file, encoding="utf-8") as source:
                return cls(source.read(), path)
        except OSError:
            return None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Tell the import system that the module is ours."""
        return ModuleSpec(name, self, origin=self.path) if name == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        """Run the source text as that of the user's file."""
        module.__file__ = self.path
        exec(compile(self.source, self.path, "exec", dont_inherit=True), module.__dict__)


def load(source: str, path: str) -> ModuleType:
    """Import the user's file, here and in the processes that it starts."""
    sys.path.append(os.path.dirname(path))  # for imports of modules beside it
    finder = UserModule(source, path)
    if hasattr(os, "memfd_create"):
        finder.hold()
    sys.meta_path.append(finder)
    return importlib.import_module(finder.name)


def where(error: BaseException, path: str) -> str:
    """Return `KeyError: 'x' (line 12)`: the error, and the line of the user's file that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    line = lines[-1] if lines else error.lineno if isinstance(error, SyntaxError) else None
    return f"{type(error).__name__}: {' '.join(said.split())}" + (f" (line {line})" if line else "")


def fault_of(error: BaseException, path: str) -> dict[str, str]:
    """Report an exception: the kind it is counted under, one line, and the user's part of the traceback."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    place = f"{lines[-1].filename}:{lines[-1].lineno}" if lines else ""
    trace = "".join(traceback.format_list(lines[-8:])) + f"{type(error).__name__}: {str(error)[:500]}"
    return {"kind": f"{type(error).__name__} {place}", "message": f"raised {where(error, path)[:500]}", "trace": trace}


# ---- the value that the function returned ----


def number(value: Any) -> float | None:
    """Return a number of Python, numpy or torch as a float; None for anything else."""
    with contextlib.suppress(Exception):  # an array of several numbers has no item(), 10**400 is no float
        value = value.item() if hasattr(value, "item") else value
        return float(value) if isinstance(value, int | float) else None
    return None


class NotAScoreError(ValueError):
    """The function returned something that is not a reward."""


def one_score(value: Any, limits: Sequence[float] = ()) -> dict[str, Any]:
    """Return {"score", "parts", "pred"} of a number or a dict with `score`. Raise NotAScoreError for anything else, and
    for what lies outside of the limits."""
    is_dict = isinstance(value, dict)
    given = value.get("score") if is_dict else value
    score = None if is_dict and isinstance(given, bool) else number(given)
    if not is_reward(score, limits):
        what = f"number from {limits[0]:g} to {limits[1]:g} (reward.range)" if limits else "finite number"
        raise NotAScoreError(f"returned {value!r:.60}; it must return a {what}, or a dict whose 'score' is one")
    acc = value.get("acc") if is_dict else None
    if acc is not None and number(acc) is None:
        raise NotAScoreError(f"returned {value!r:.60}; its 'acc' must be true or false, or a number from 0 to 1")
    parts = {str(k): x for k, v in value.items() if k != "score" and (x := number(v)) is not None} if is_dict else {}
    pred = value.get("pred") if is_dict else None
    return {"score": score, "parts": parts, "pred": None if pred is None else str(pred)}


def ranked_scores(value: Any, count: int, limits: Sequence[float] = ()) -> dict[str, Any]:
    """Return {"scores": one of each} of [(index, score), ...] with each index once; a score may be a dict with
    `score` and `acc`. Raise NotAScoreError for anything else."""
    try:
        scores = {int(index): one_score(score, limits) for index, score in value}
        complete = len(list(value)) == count and sorted(scores) == list(range(count))
    except (TypeError, ValueError):  # of which NotAScoreError is one
        complete = False
    if not complete:
        what = f"score from {limits[0]:g} to {limits[1]:g}" if limits else "finite score"
        raise NotAScoreError(
            f"returned {value!r:.120}; it must return (index, {what}) for each of the {count} responses"
        )
    return {"scores": [scores[i] for i in range(count)]}


# ---- the process ----


class Worker:
    """Answer calls until the parent is gone."""

    def __init__(self, channel: Channel, settings: dict[str, Any]):
        self.channel, self.settings, self.path = channel, settings, settings["path"]
        self.requests: SimpleQueue[tuple[int, bytes]] = SimpleQueue()
        self.arrived: Callable[[], None] | None = None
        self.pid = os.getpid()
        os.register_at_fork(after_in_child=channel.sock.close)  # our end of it closes when we end, not when they do
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        """Queue the calls that arrive; at the end of the stream, end the process group."""
        with contextlib.suppress(Exception):
            while (message := self.channel.receive()) is not None:
                self.requests.put(pickle.loads(message))
                if self.arrived:
                    self.arrived()
        os.killpg(0, signal.SIGKILL)  # the parent is gone; this also ends what the function started

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to the parent."""
        self.end_fork()
        self.channel.send(json.dumps(message).encode())

    def end_fork(self) -> None:
        """End a process that the function has forked: the call is not its to answer, and the event loop not its own."""
        if os.getpid() != self.pid:
            os._exit(0)

    def load_function(self) -> Callable[..., Any] | None:
        """Import the file and return the function to call; tell the parent what it is, or why there is none."""
        try:
            for name in self.settings["imports"]:
                importlib.import_module(name)
            module = load(self.settings["source"], self.path)
            ranking = getattr(module, "rank_responses", None) if self.settings["allow_ranking"] else None
            self.scores_groups = callable(ranking) and not self._is_default(ranking)
            function = ranking if self.scores_groups else getattr(module, self.settings["name"], None)
            if self.settings["warm_up"] is not None:
                function(**self.settings["warm_up"])
        except BaseException as e:  # also sys.exit() in a module
            self.send({"refused": f"{self.path} does not import: {where(e, self.path)}."})
            return None
        if not callable(function):
            there = {n: f for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
            refused = f"{self.path} has no function {self.settings['name']!r} (reward.name); "
            refused += f"it has {', '.join(there)}." if there else "it has no function at all."
            batched = next((name for name, f in there.items() if "completions" in _required(f)), None)
            refused += f" {trl_answer(batched, _required(there[batched]))}" if batched else ""
            self.send({"refused": refused})
            return None
        # An object with `async def __call__` counts as well.
        self.concurrent = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
        keywords = {"keywords": _keywords(function), "required": _required(function)}
        keywords["has_function"] = callable(getattr(module, self.settings["name"], None))
        self.send({"scores_groups": self.scores_groups, "concurrent": self.concurrent, **keywords})
        return function

    def _is_default(self, ranking: Callable[..., Any]) -> bool:
        """Return whether this is our own `rank_responses` or a copy: it only sorts the scores of compute_score."""
        with contextlib.suppress(OSError, TypeError):
            return inspect.getsource(ranking) == self.settings["default_ranking"]
        return False

    def score_reply(self, value: Any, call: dict[str, Any]) -> dict[str, Any]:
        """Return the reply for a value that the function returned. Raise NotAScoreError."""
        limits = self.settings["range"]
        return ranked_scores(value, len(call["responses"]), limits) if self.scores_groups else one_score(value, limits)

    def fault_reply(self, error: BaseException) -> dict[str, Any]:
        """Return the reply for an exception."""
        if isinstance(error, NotAScoreError):
            return {"fault": {"kind": str(error)[:24], "message": str(error), "trace": ""}}
        reply = {"fault": fault_of(error, self.path)}
        if isinstance(error, MemoryError):
            reply["fault"]["message"] += f"; reward.memory_gib = {self.settings['memory_gib']:g} is the limit"
            reply["last"] = True  # its memory may be used up: a new process takes over
        return reply

    def serve(self, function: Callable[..., Any]) -> None:
        """Make one call after another. An awaitable that a plain function returns is run to its end."""
        loop = None
        while True:
            index, arguments = self.requests.get()
            signal.setitimer(signal.ITIMER_REAL, self.settings["timeout_s"] + BACKSTOP_S)
            try:
                call = pickle.loads(arguments)
                value = function(**call)
                if inspect.isawaitable(value):
                    loop = loop or asyncio.new_event_loop()
                    reply = loop.run_until_complete(self.await_reply(value, call))
                else:
                    reply = self.score_reply(value, call)
            except BaseException as e:
                reply = self.fault_reply(e)
            value = None
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            self.reply(index, reply)

    async def await_reply(self, value: Awaitable[Any], call: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to a call that returned an awaitable, which is cancelled at the time limit."""

        async def score() -> dict[str, Any]:
            try:
                result = await value
                self.end_fork()
                return self.score_reply(result, call)
            except BaseException as e:  # a SystemExit would end the loop and every other call in it
                self.end_fork()
                return self.fault_reply(e)

        task = asyncio.ensure_future(score())
        done, _ = await asyncio.wait({task}, timeout=self.settings["timeout_s"])
        if not done:
            task.cancel()
            return {"timeout": ""}
        return task.result()

    async def serve_concurrently(self, function: Callable[..., Any]) -> None:
        """Make all calls that have arrived at the same time."""
        loop, arrived, running = asyncio.get_running_loop(), asyncio.Event(), set()
        self.arrived = lambda: loop.call_soon_threadsafe(arrived.set)

        async def one(index: int, arguments: bytes) -> None:
            try:
                call = pickle.loads(arguments)
                reply = await self.await_reply(function(**call), call)
            except Exception as e:  # e.g. it does not take these keywords
                reply = self.fault_reply(e)
            self.reply(index, reply)

        while True:
            while not self.requests.empty():
                task = loop.create_task(one(*self.requests.get()))
                running.add(task)
                task.add_done_callback(running.discard)
            await arrived.wait()
            arrived.clear()

    def reply(self, index: int, reply: dict[str, Any]) -> None:
        """Send a reply, after what was printed; after the last one, end the process."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        self.send({"index": index, **reply})
        if reply.get("last"):
            os._exit(0)


def _keywords(function: Callable[..., Any]) -> list[str] | None:
    """Return the keywords that `function` takes; None where it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _required(function: Callable[..., Any]) -> list[str]:
    """Return the keywords without which `function` cannot be called."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in named and p.default is p.empty]


NOT_GIVEN = ("prompts", "completion_ids", "prompt_ids", "trainer_state")  # TRL gives these besides a row's columns


def trl_answer(name: str, required: list[str], named: bool = False) -> str:
    """Return how a function that TRL calls with a batch of `completions` is called here, with one response.

    `named`: reward.name names it, which is then to be left out.
    """
    kept = "score_batch" if name == "compute_score" else name
    columns = {key: f"extra_info['{key}']" for key in required if key != "completions"}
    columns |= {key: "..." for key in NOT_GIVEN if key in columns}
    if "ground_truth" in columns:
        columns["ground_truth"] = "ground_truth"
    others = "".join(f", {key}=[{value}]" for key, value in columns.items())
    return (
        f"{name} takes a batch of `completions`, as TRL calls it; here a call scores one response. "
        + (f"Rename it to {kept} and add" if kept != name else "Add")
        + " `def compute_score(solution_str, ground_truth, extra_info): return "
        + f"{kept}(completions=[[{{'content': solution_str}}]]{others})[0]`: a list of one for each column that it "
        "reads, completions=[solution_str] where it reads texts." + named * " Leave reward.name out."
    )


def limit_memory(gib: float) -> None:
    """Limit this process's memory; let the kernel, when memory runs out, end it before the trainer."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        if gib:
            resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30), int(gib * 2**30)))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Connect to the parent, import the user's file and answer calls."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    if guardian.available():
        guardian.fork_worker(sock)
    channel = Channel(sock)
    first = channel.receive()
    if first is None:
        return
    settings = pickle.loads(first)
    faulthandler.enable()  # a segmentation fault prints its line
    faulthandler.register(signal.SIGUSR2, all_threads=False)  # the parent asks a call that hangs for its line
    limit_memory(settings["memory_gib"])
    worker = Worker(channel, settings)
    function = worker.load_function()
    if function is None:
        os._exit(0)
    if worker.concurrent:
        asyncio.run(worker.serve_concurrently(function))
    else:
        worker.serve(function)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__" and (user_module := UserModule.held()):  # a process that the user's code has started
    sys.meta_path.append(user_module)

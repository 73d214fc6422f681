"""Choose between our kernels and PyTorch's operators by a measurement on this machine, and keep what was found.

What an instruction set promises does not say which is faster. So both compute, once on a machine, and the choice is
kept in the user's cache folder: a run that is resumed computes as before. Of processes that ask together one measures
while the others wait, so the ranks of a run compute alike. GSPO_NATIVE=1 takes our kernels without a measurement.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gspo.kernels.native import cache_folder, library

MUCH = 1.1  # PyTorch has to be so many times as fast: ours need less memory, and fewer calls
TURNS = 3  # at least
ALIKE = 1.1  # a shortest time counts once there is another that is at most so many times as long
ENOUGH = 0.15  # seconds after which an operation is not repeated any more in the hope of such a one
PATIENCE = 60  # seconds to wait for another process that measures
KEPT = "choices.json"  # {key: {operation: whether ours won}}

Times = dict[str, tuple[float, float]]  # operation -> seconds of ours, of PyTorch's
Choices = dict[str, bool]  # operation -> whether ours is used


def ours_always() -> bool:
    """Return whether the environment chooses our kernels without a measurement."""
    return os.environ.get("GSPO_NATIVE") == "1"


def decide(
    what: list[Any], measure: Callable[[], Times], describe: Callable[[Times, Choices], str], much: float = MUCH
) -> Choices:
    """Return the choices that are kept for this machine and `what`, or measure, say by `describe` and keep them.

    Ours is chosen where PyTorch's is not more than `much` times as fast.
    """
    asked = [Path(library()._name).stem, torch.__version__, torch.get_num_threads(), *what]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    if (kept := _read().get(key)) is not None:
        return kept
    with _alone():
        if (kept := _read().get(key)) is None:  # else another process has measured meanwhile
            times = _by_itself(measure)
            kept = {name: ours <= theirs * much for name, (ours, theirs) in times.items()}
            _write(_read() | {key: kept})
            print(f"kernels/cpu: {describe(times, kept)}", file=sys.stderr, flush=True)
    return kept


def seconds(*works: Callable[[], object]) -> tuple[float, ...]:
    """Return the shortest time of each work, in turns, so that a busy moment meets all.

    On a quiet machine three turns are enough; on a busy one they go on until no shortest time stands alone.
    """
    times: list[list[float]] = [[] for _ in works]
    for work in works:  # cold caches, threads that have yet to start
        work()
    end = time.perf_counter() + ENOUGH
    while True:
        for work, mine in zip(works, times, strict=True):
            began = time.perf_counter()
            work()
            mine.append(time.perf_counter() - began)
            mine.sort()
        if len(times[0]) >= TURNS and (time.perf_counter() > end or all(a * ALIKE >= b for a, b, *_ in times)):
            return tuple(shortest for shortest, *_ in times)


def _by_itself(measure: Callable[[], Times]) -> Times:
    """Measure in a new thread, in which no autocast, fake tensors or other mode of the caller is on."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(measure).result()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let one process of this machine in at a time; all where there is no lock."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(
            OSError, RuntimeError
        ):  # of a folder that cannot be written, a file system without locks
            file = stack.enter_context((cache_folder() / "choices.lock").open("a"))
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.02)
        yield


def _read() -> dict[str, Choices]:
    """Return the choices that are kept; none where the file is missing or damaged."""
    try:
        found = json.loads((cache_folder() / KEPT).read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError, RecursionError):
        return {}
    return {k: v for k, v in found.items() if _is_choices(v)} if isinstance(found, dict) else {}


def _is_choices(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(x, bool) for x in value.values())


def _write(kept: dict[str, Choices]) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # measured again by the next process
        part = cache_folder() / f"choices-{os.getpid()}.part"
        part.write_text(json.dumps(kept), encoding="utf-8")
        os.replace(part, cache_folder() / KEPT)

"""Work that never waits for the host, as CUDA graphs: recorded once a size, then launched as a whole."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Replay:
    """`work(size)` by graphs, if `graphs` is true: run as it is the first time that a size comes, recorded the second.

    Only the work's effects on tensors that were there before are its own: what it allocates belongs to its graph. Work
    that waits for the device, or cannot be recorded, goes on being run as it is, and one line on stderr says so.
    """

    def __init__(self, work: Callable[[int], None], graphs: bool):
        self._work, self._record = work, graphs
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # None: seen once

    def __call__(self, size: int) -> None:
        if not self._record:
            self._work(size)
        elif size not in self._graphs:
            self._graphs[size] = None
            self._attempt(size, self._first)
        elif self._graphs[size] is None:
            self._attempt(size, self._capture)
        else:
            self._graphs[size].replay()

    def _attempt(self, size: int, run: Callable[[int], None]) -> None:
        try:
            run(size)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            self._record = False
            self._graphs.clear()
            print(f"sampling without CUDA graphs: {str(e).splitlines()[0]}", file=sys.stderr)
            self._work(size)

    def _first(self, size: int) -> None:
        """Compiles what has to be compiled; an error where something waits for the device."""
        with no_waiting():
            self._work(size)

    def _capture(self, size: int) -> None:
        graph, others = torch.cuda.CUDAGraph(), [g for g in self._graphs.values() if g is not None]
        pool = others[0].pool() if others else None
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._work(size)
        self._graphs[size] = graph
        graph.replay()


@contextmanager
def no_waiting() -> Iterator[None]:
    """RuntimeError where the host is about to wait for the device inside."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is new
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)

"""Work that never waits for the host, as CUDA graphs: recorded once a size, then launched as a whole."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Work = Callable[[int], None]


class Replay:
    """Calls work(size), always the same work; by graphs on a GPU `device`, where it is run as it is the first time that
    a size comes, and recorded the second.

    The work is not kept: it may own what owns its graphs. Only its effects on tensors that were there before are its
    own: what it allocates belongs to its graph. Work that waits for the device, or cannot be recorded, goes on being
    run as it is, and one line on stderr says so.
    """

    def __init__(self, device: torch.device | None):
        self._device = device
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # None: seen once

    def __call__(self, work: Work, size: int) -> None:
        if self._device is None:
            work(size)
            return
        with torch.cuda.device(self._device):
            if size not in self._graphs:
                self._graphs[size] = None
                self._attempt(self._first, work, size)
            elif self._graphs[size] is None:
                self._attempt(self._capture, work, size)
            else:
                self._graphs[size].replay()

    def _attempt(self, run: Callable[[Work, int], None], work: Work, size: int) -> None:
        try:
            run(work, size)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            self._device = None
            self._graphs.clear()
            print(f"sampling without CUDA graphs: {str(e).splitlines()[0]}", file=sys.stderr)
            work(size)

    def _first(self, work: Work, size: int) -> None:
        """Compiles what has to be compiled; an error where something waits for the device."""
        with no_waiting():
            work(size)

    def _capture(self, work: Work, size: int) -> None:
        graph, others = torch.cuda.CUDAGraph(), [g for g in self._graphs.values() if g is not None]
        pool = others[0].pool() if others else None
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work(size)
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

"""Replay a decoding step as a CUDA graph: captured once for each number of slots, then launched as a whole."""

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Work = Callable[[int], None]


class Replay:
    """Call work(size), always the same work; on a GPU `device` through one CUDA graph for each size.

    The first call with a size runs the work directly, the second captures it, later ones replay the graph. The work
    is not kept in here, as it may own this object. Its results must be written to tensors that existed before:
    whatever it allocates belongs to the graph. Work that waits for the device or cannot be captured is always run
    directly, and one line on stderr says so.
    """

    def __init__(self, device: torch.device | None):
        self._device = device
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # None: run once, not captured yet

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
        """Run the work directly, which compiles its kernels; RuntimeError where it waits for the device."""
        with no_waiting():
            work(size)

    def _capture(self, work: Work, size: int) -> None:
        graph, others = torch.cuda.CUDAGraph(), [g for g in self._graphs.values() if g is not None]
        pool = others[0].pool() if others else None
        stream = _capture_stream(self._device)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work(size)
        self._graphs[size] = graph
        graph.replay()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures: every stream that computes has a cuBLAS workspace, which is never freed."""
    return torch.cuda.Stream(device)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise RuntimeError where the host would wait for the device inside."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's note that the debug mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)

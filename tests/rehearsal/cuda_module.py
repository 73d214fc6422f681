"""Stand in for torch.cuda: one device of 80 GiB, streams and events that are done at once, graphs that replay."""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Callable
from typing import Any

import torch
from device import CUDA, Recorder, wait

CAPABILITY = tuple(int(x) for x in os.environ.get("REHEARSED_CAPABILITY", "9.0").split("."))
MEMORY = 80 << 30  # bytes
graphs: list[Graph] = []  # all that were made


class Stream:
    """A stream: all work is done in the order of its calls, whatever its stream."""

    device = CUDA
    made = 0  # streams

    def __init__(self, *args: Any, **kwargs: Any):
        Stream.made += 1
        self.cuda_stream = self.stream_id = Stream.made

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        wait("Stream.synchronize")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


class Event:
    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        wait("Event.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 1.0  # milliseconds; no time is measured here


class Graph:
    """The operations of a capture."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.operations: list[Callable[[], None]] | None = None
        self.replays, self.stream = 0, None
        graphs.append(self)

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def replay(self) -> None:
        assert self.operations is not None, "replayed before it was captured"
        self.replays += 1
        with torch.no_grad():
            for operation in self.operations:
                operation()

    def reset(self) -> None:
        self.operations = None


class Capture:
    """torch.cuda.graph: operations inside are recorded, and change nothing; a wait of the host is an error."""

    def __init__(self, graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"):
        self.graph = graph
        graph.stream = stream

    def __enter__(self) -> None:
        Recorder.begin()

    def __exit__(self, *args: Any) -> None:
        self.graph.operations = Recorder.end()


def set_sync_debug_mode(mode: int | str) -> None:
    Recorder.sync_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)


def synchronize(device: Any = None) -> None:
    if Recorder.operations is not None or Recorder.sync_mode:
        wait("torch.cuda.synchronize")


def constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def install_cuda() -> None:
    """Put these in the place of torch.cuda's own."""
    properties = types.SimpleNamespace(
        major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY, multi_processor_count=132, warp_size=32,
        name="a rehearsal, not a GPU", gcnArchName="", max_threads_per_multi_processor=2048, L2_cache_size=50 << 20,
        shared_memory_per_block_optin=232_448, regs_per_multiprocessor=65_536,
    )  # fmt: skip
    null = contextlib.nullcontext
    main_stream = Stream()
    stand_ins = {
        "is_available": constant(True), "is_initialized": constant(True), "_lazy_init": constant(None),
        "init": constant(None), "device_count": constant(1), "current_device": constant(0),
        "set_device": constant(None), "get_device_capability": constant(CAPABILITY),
        "get_device_properties": constant(properties), "get_device_name": constant(properties.name),
        "get_arch_list": constant(["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]),
        "is_bf16_supported": lambda including_emulation=True: including_emulation or CAPABILITY >= (8, 0),
        "mem_get_info": constant((MEMORY - (1 << 30), MEMORY)), "memory_allocated": constant(0),
        "memory_reserved": constant(0), "max_memory_allocated": constant(0), "max_memory_reserved": constant(0),
        "reset_peak_memory_stats": constant(None), "memory_stats": constant({}), "empty_cache": constant(None),
        "manual_seed": constant(None), "manual_seed_all": constant(None),
        "get_rng_state": constant(torch.zeros(16, dtype=torch.uint8)), "set_rng_state": constant(None),
        "get_sync_debug_mode": lambda: Recorder.sync_mode, "set_sync_debug_mode": set_sync_debug_mode,
        "synchronize": synchronize, "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": Capture,
        "current_stream": constant(main_stream), "default_stream": constant(main_stream),
        "stream": lambda stream: null(), "device": lambda device: null(), "device_of": lambda tensor: null(),
        "is_current_stream_capturing": lambda: Recorder.operations is not None, "_sleep": constant(None),
    }  # fmt: skip
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = "13.0"
    torch._C._cuda_getDeviceCount = constant(1)
    torch.backends.cuda.is_flash_attention_available = constant(True)

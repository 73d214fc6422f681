"""Say when freed memory stays in the process and when it goes back to the system (glibc's malloc)."""

import contextlib
import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
TOP_PAD_BYTES = 64 * 2**20  # bytes asked of the system at a time


def keep_freed_memory() -> None:
    """Keep freed memory in the process, for the next tensors, instead of returning it to the system.

    A training step frees gigabytes and allocates them again, and the system hands memory out in pages of 4 KiB, each
    cleared at its first use. The peak memory stays the same. Only for glibc, and only where the environment has no
    malloc settings (MALLOC_*, GLIBC_TUNABLES).
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never
    mallopt(M_TOP_PAD, TOP_PAD_BYTES)


def return_freed_memory() -> None:
    """Return all freed memory to the system (glibc malloc_trim), after work that allocates otherwise than a step.

    What a step frees would otherwise lie between what an evaluation has left, and the next step's tensors would find no
    place in it: a process would grow with every evaluation. The pages are faulted in again once, in a second or less.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)

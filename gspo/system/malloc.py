"""What the C library does with memory that was freed."""

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
AHEAD = 64 * 2**20  # bytes asked of the system at a time


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, for the next tensors, instead of going back to the system.

    A training step frees gigabytes and asks for them again, and the system hands memory out by pages of 4 KiB, each
    cleared at its first use. The most that a process takes is the same. For glibc; nothing is done elsewhere, or where
    the environment has settings for malloc of its own.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never
    mallopt(M_TOP_PAD, AHEAD)

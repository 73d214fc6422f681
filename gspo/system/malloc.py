"""Keep freed memory in the process (glibc mallopt), so that a step does not fault its pages in again."""

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

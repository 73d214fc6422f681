"""Read what torchrun says about this process in its environment: the only file that knows the names of its variables.

Without torchrun a process is rank 0 of 1. The values are read at each call. See "Environment Variables" in
https://docs.pytorch.org/docs/stable/elastic/run.html.
"""

import os


def rank() -> int:
    """Return this process's number among all processes of the run, 0 ... world_size() - 1."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes the run has, on all machines together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return this process's number among those on its machine: also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return how many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def restart_count() -> int:
    """Return how often torchrun has started all processes again after one failed (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def is_main() -> bool:
    """Return whether this is rank 0: the one process that prints and writes what the run has only once."""
    return rank() == 0


def agent_address() -> tuple[str, int] | None:
    """Return host and port of the store that the torchrun agent serves, or None where no agent started this process."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def cpu_cores() -> int:
    """Return how many CPU cores this process may use: those of its machine, shared equally by the ranks on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size())

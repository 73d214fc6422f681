"""Read what torchrun says about this process in its environment: the only file that knows the names of its variables.

Without torchrun a process is rank 0 of 1. The values are read at each call. See "Environment Variables" in
https://docs.pytorch.org/docs/stable/elastic/run.html.
"""

import os

from gspo.errors import UserError


def _number(name: str, default: int, least: int = 0) -> int:
    """Return a whole number of the environment. UserError where it holds something else."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or len(text) > 9 or int(text) < least:
        raise UserError(
            f"{name} = {text!r:.60} in the environment is not a whole number from {least} on. torchrun sets it; unset "
            "it to train on one process."
        )
    return int(text)


def rank() -> int:
    """Return this process's number among all processes of the run, 0 ... world_size() - 1."""
    return _number("RANK", 0)


def world_size() -> int:
    """Return how many processes the run has, on all machines together."""
    return _number("WORLD_SIZE", 1, least=1)


def local_rank() -> int:
    """Return this process's number among those on its machine: also the number of its GPU."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Return how many processes of the run share this machine."""
    return _number("LOCAL_WORLD_SIZE", 1, least=1)


def restart_count() -> int:
    """Return how often torchrun has started all processes again after one failed (--max-restarts)."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def is_main() -> bool:
    """Return whether this is rank 0: the one process that prints and writes what the run has only once."""
    return os.environ.get("RANK", "0") == "0"


def check_environment() -> None:
    """Raise UserError where the environment describes no rank of a run: what started this process was not torchrun."""
    if rank() >= world_size():
        raise UserError(f"RANK = {rank()} in the environment, but WORLD_SIZE = {world_size()}: start it with torchrun.")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size() > 1 and missing:
        raise UserError(
            f"WORLD_SIZE = {world_size()} in the environment, but {' and '.join(missing)} are missing: start it with "
            "torchrun, or unset WORLD_SIZE and RANK to train on one process."
        )
    _number("MASTER_PORT", 29500)


def agent_address() -> tuple[str, int] | None:
    """Return host and port of the store that the torchrun agent serves, or None where no agent started this process."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def cpu_cores() -> int:
    """Return how many CPU cores this process may use: those of its machine, shared equally by the ranks on it.

    A rank that is bound to fewer cores than torchrun, its parent, has those for itself.
    """
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return max(1, (os.cpu_count() or 1) // local_world_size())
    try:
        return cores_of(os.sched_getaffinity(0), os.sched_getaffinity(os.getppid()), local_world_size())
    except OSError:  # the parent has ended, or is another user's
        return max(1, len(os.sched_getaffinity(0)) // local_world_size())


def cores_of(own: set[int], parents: set[int], ranks: int) -> int:
    """Return how many of its cores a rank uses: all where it is bound to less than its parent, else its share."""
    return len(own) if own < parents else max(1, len(own) // ranks)

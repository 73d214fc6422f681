"""Let the rank that fails say why, once, and the others leave without a word.

Ranks agree through the store at which they met: the failing rank writes there before it ends, so another whose
exchange with it breaks off finds the reason given.
"""

import hashlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from gspo.errors import UserError
from gspo.system.language import translated
from gspo.system.program import end_process, failed_file

WAIT_S = 1.0  # how long a rank waits for another to say the same, or to say why it ended
FAILED, LOST = "failed", "lost a rank"
BROKEN_OFF = ("by peer", "Broken pipe", "Connection refused", "Timed out waiting", "[gloo]", "gloo/transport")


def leave(error: Exception, store: dist.Store, rank: int) -> NoReturn:
    """Report the error that ends this rank, unless another has, and end the process: exit code 2 for a UserError."""
    name = "" if rank == 0 else f"rank {rank}: "
    if _broke_off(error):
        if _wait(lambda: store.check([FAILED])):
            end_process(int(_ask(lambda: store.get(FAILED), b"1")))
        code, key = 1, LOST
        text = f"{name}error: another process of this run has ended without saying why ({_one_line(error)})."
    elif isinstance(error, UserError):
        code, key, text = 2, str(error), f"{name}error: {error}"
    elif text := failed_file(error):
        code, key, text = 2, text, f"{name}{text}"
    else:
        code, key = 1, f"{type(error).__name__} {error}"
        text = "".join([f"{name}error:\n", *traceback.format_exception(error)]).rstrip()
    key = "said " + hashlib.sha256(key.encode("utf-8", "backslashreplace")).hexdigest()
    _ask(lambda: store.compare_set(FAILED, "", str(code)), b"")
    if rank > 0:  # of ranks that fail in the same way, rank 0 speaks
        _wait(lambda: store.check([key]))
    if _ask(lambda: store.add(key, 1), 1) == 1:
        print(translated(text), file=sys.stderr, flush=True)
    end_process(code)


def _broke_off(error: Exception) -> bool:
    """Return whether the error is that of an exchange whose other side has ended."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in BROKEN_OFF)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


def _ask(question: Callable[[], object], otherwise: object) -> object:
    """Return the store's answer, or `otherwise` where the store has ended."""
    try:
        return question()
    except RuntimeError:
        return otherwise


def _wait(true: Callable[[], bool]) -> bool:
    """Ask until it is true, for at most WAIT_S; return whether it is."""
    until = time.monotonic() + WAIT_S
    while not (found := bool(_ask(true, False))) and time.monotonic() < until:
        time.sleep(0.02)
    return found

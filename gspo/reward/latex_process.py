"""Compare LaTeX in a process that can be killed: math-verify computes some answers for ever."""

import functools
import os
import re
import threading
from collections import deque
from typing import Any

LATEX_S, LEAST_LATEX_S = 3.0, 0.25  # limit for one comparison; halved with each of the last 32 that reached it
MAX_LENGTH = 200
_LATEX = re.compile(r"[\\^_({\[=<>|√π∞≤≥∪!+*]|\d ?[a-z]", re.IGNORECASE)
_lock = threading.Lock()
_overdue: deque[bool] = deque(maxlen=32)  # whether each of the last comparisons reached its time limit


def same_mathematics(gold: str, given: str) -> bool:
    """Return whether math-verify, used as in gspo/reward/latex.py, finds the two equal; False where in doubt."""
    if len(given) > MAX_LENGTH or not (_LATEX.search(gold) or _LATEX.search(given)):
        return False
    with _lock:
        return _compare(gold, given, os.getpid())


@functools.lru_cache(maxsize=4096)  # responses of a group often give the same answer
def _compare(gold: str, given: str, process: int) -> bool:
    """Return whether the two are equal; `process` is the caller's, as a fork needs a pool of its own."""
    pool = latex_pool(process)
    if pool is None:
        return False
    outcome = pool.submit({"gold": gold, "given": given}).result()
    if outcome.fault == "timeout" and sum(_overdue) == 3:
        print("LaTeX answers that take seconds to compare: until they end, each gets a fraction of a second")
    _overdue.append(outcome.fault == "timeout")
    pool.timeout_s = max(LATEX_S / 2 ** sum(_overdue), LEAST_LATEX_S)
    return outcome.reply.get("score") == 1.0


@functools.lru_cache(maxsize=1)
def latex_pool(process: int) -> Any:
    """Return the pool of one process that compares LaTeX; None where math-verify is not installed."""
    from gspo.reward import latex
    from gspo.reward.worker_handle import Settings
    from gspo.reward.worker_pool import WorkerPool

    if not latex.available():
        return None
    first = {"gold": "x^{2}+1", "given": "1+x^{2}"}
    settings = Settings(latex.__file__, "equivalent", LATEX_S, 2.0, imports=("math_verify",), warm_up=first)
    return WorkerPool(settings, 1, spare=True)

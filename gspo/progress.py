"""Progress: a bar on a terminal, a plain line now and then elsewhere, nothing for what takes under two seconds."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
DELAY_S, LINE_EVERY_S = 2.0, 15.0


def is_main() -> bool:
    """True on the one process that talks."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line from the main process, above any bar."""
    if is_main():
        with contextlib.suppress(OSError):  # a log file on a full disk is no reason to stop
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items`, showing how far it got."""
    if not is_main():
        yield from items
        return
    if sys.stdout.isatty():
        yield from tqdm(items, what, total=total, delay=DELAY_S, leave=False, file=sys.stdout, dynamic_ncols=True)
        return
    total = total if total is not None else len(items) if hasattr(items, "__len__") else None
    started = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last > LINE_EVERY_S:
            last = now
            print(f"{what}: {done}{f' / {total}' if total else ''}, {now - started:.0f} s", flush=True)
        yield item

"""Show progress: a bar on a terminal, a line every 15 seconds elsewhere; on a terminal nothing for the first two."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from gspo.system.torchrun import is_main, world_size

T = TypeVar("T")
DELAY_S, SHOW_EVERY_S, LINE_EVERY_S = 2.0, 0.5, 15.0
SAMPLING = "{l_bar}{bar}| {n_fmt}/{total_fmt} responses{postfix} [{elapsed}<{remaining}]"


def say(text: str) -> None:
    """Print a line from the main process, above any bar."""
    if is_main():
        with contextlib.suppress(OSError):  # the run goes on if its output goes to a full disk
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


class LiveTable:
    """A table on a terminal whose last row is rewritten in place; what `say` prints comes above that row."""

    def __init__(self, titles: dict[str, int]):
        """Print the titles. titles: {title: width of its column}."""
        self.widths, self.row = list(titles.values()), None
        say(self._aligned(list(titles)))

    def show(self, cells: list[str], new_row: bool = False) -> None:
        """Show a row: in place of the last one, or below it, which then stays as it is."""
        if new_row:
            self.close()
        if self.row is None:
            self.row = tqdm(bar_format="{desc}", leave=True, file=sys.stdout, dynamic_ncols=True)
        self.row.set_description_str(self._aligned(cells))

    def close(self) -> None:
        """Leave the last row as it is."""
        if self.row is not None:
            self.row.close()
        self.row = None

    def _aligned(self, cells: list[str]) -> str:
        return "  ".join(cell.rjust(width) for cell, width in zip(cells, self.widths, strict=True))


def time_left(seconds: float) -> str:
    """Return a time as `45 s`, `12 min` or `3 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` and show how many are done."""
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


@contextmanager
def track_sampling(what: str, total: int, progress: Callable[[], tuple[int, int]]) -> Iterator[Callable[[], None]]:
    """Show the progress of sampling: responses done of `total`, tokens per second.

    Yields a function to call at every step. It calls `progress` for (responses, tokens) only when an update is due.
    """
    if not is_main():
        yield lambda: None
        return
    bar = None
    if sys.stdout.isatty():
        shown = {"delay": DELAY_S, "leave": False, "file": sys.stdout, "dynamic_ncols": True, "miniters": 0}
        bar = tqdm(desc=what, total=total, bar_format=SAMPLING, **shown)
    every = LINE_EVERY_S if bar is None else SHOW_EVERY_S
    began = last = time.monotonic()

    def tick() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last <= every:
            return
        last, (done, tokens) = now, progress()
        rate = f"{tokens / (now - began):,.0f} tok/s"
        if world_size() > 1:
            rate += " on this rank"
        if bar is None:
            print(f"{what}: {done} / {total} responses, {rate}, {now - began:.0f} s", flush=True)
        else:
            bar.set_postfix_str(rate, refresh=False)
            bar.update(done - bar.n)

    try:
        yield tick
    finally:
        if bar is not None:
            bar.close()

"""Show progress: a bar on a terminal, a line every 15 seconds elsewhere; on a terminal nothing for the first two."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from gspo.system.cells import flush_right, fold, width
from gspo.system.language import translated, word
from gspo.system.torchrun import is_main, world_size

T = TypeVar("T")
DELAY_S, SHOW_EVERY_S, LINE_EVERY_S = 2.0, 0.5, 15.0
FIRST_LINE_S = 4.0  # after which a phase that has a name says how long it takes
TELLING = 1 / 8  # share of the responses that tell the time left; those that end before are the shortest
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}]"


_phase = ""  # what the sampling that goes on now is for, where that is not a step


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Give what is sampled inside a name, under which its progress is shown."""
    global _phase
    before, _phase = _phase, name
    try:
        yield
    finally:
        _phase = before


class Line(tqdm):
    """A line that is rewritten in place: the row of a table, and below it a bar."""

    def moveto(self, n: int) -> None:
        """Move the cursor up or down, by characters that output.py would show in a text."""
        getattr(self.fp, "write_as_is", self.fp.write)("\n" * n + "\x1b[A" * -n)
        self.fp.flush()


def say(text: str) -> None:
    """Print a line from the main process, above any bar; on a terminal, long sentences are broken between words."""
    if is_main():
        with contextlib.suppress(OSError):  # the run goes on if its output goes to a full disk
            Line.write(_laid_out(translated(text)), file=sys.stdout)
            sys.stdout.flush()


def _laid_out(text: str) -> str:
    """Fold sentences at the width of the terminal, if there is one; commands and tables, which are indented or have
    several spaces in a row, are left as they are."""
    if not sys.stdout.isatty():
        return text
    columns = shutil.get_terminal_size((200, 24)).columns
    return "\n".join(line if "  " in line else fold(line, columns) for line in text.split("\n"))


class LiveTable:
    """A table on a terminal whose last row is rewritten in place; what `say` prints comes above that row."""

    def __init__(self, titles: dict[str, int]):
        """Print the titles, {title: width of its column}, of the first columns that the terminal has room for."""
        room, self.widths, self.row = shutil.get_terminal_size((200, 24)).columns, {}, None
        for title, cells in titles.items():
            needed = max(cells, width(word(title)))
            if sum(self.widths.values()) + 2 * len(self.widths) + needed >= room:
                break
            self.widths[title] = needed
        say(self._aligned({title: word(title) for title in titles}))

    def show(self, cells: dict[str, str], new_row: bool = False) -> None:
        """Show a row, {title: cell}: in place of the last one, or below it, which then stays as it is."""
        if new_row:
            self.close()
        if self.row is None:
            self.row = Line(bar_format="{desc}", leave=True, file=sys.stdout, dynamic_ncols=True)
        self.row.set_description_str(self._aligned(cells))

    def close(self) -> None:
        """Leave the last row as it is."""
        if self.row is not None:
            self.row.close()
        self.row = None

    def _aligned(self, cells: dict[str, str]) -> str:
        return "  ".join(flush_right(translated(cells[title]), needed) for title, needed in self.widths.items())


def time_left(seconds: float) -> str:
    """Return a time as `45 s`, `12 min` or `3 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def duration(seconds: float) -> str:
    """Return a time that has passed as `45 s`, `5 min 29 s` or `3 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _bar(what: str, total: int | None, bar_format: str = BAR, **options: int) -> Line | None:
    """Return a bar on the terminal: below the row of a table, if there is one; None where it cannot go back up."""
    if Line._instances and os.environ.get("TERM", "dumb") == "dumb":
        return None
    shown = {"delay": DELAY_S, "leave": False, "file": sys.stdout, "dynamic_ncols": True, **options}
    return Line(desc=what, total=total, bar_format=bar_format, **shown)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` and show how many are done."""
    if not is_main():
        yield from items
        return
    what = translated(what)
    total = total if total is not None else len(items) if hasattr(items, "__len__") else None
    if sys.stdout.isatty() and (bar := _bar(what, total)) is not None:
        with bar:
            for item in items:
                yield item
                bar.update()
        return
    started = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last > LINE_EVERY_S:
            last = now
            say(f"{what}: {f'{done} / {total}' if total else done}, {now - started:.0f} s")
        yield item


@contextmanager
def track_sampling(what: str, total: int, progress: Callable[[], tuple[int, int]]) -> Iterator[Callable[[], None]]:
    """Show the progress of sampling: responses done of `total`, tokens per second, and in a `phase`, whose name stands
    for `what`, the time left.

    Yields a function to call at every step. It calls `progress` for (responses, tokens) only when an update is due.
    """
    if not is_main():
        yield lambda: None
        return
    bar, what, named = None, word(_phase or what), bool(_phase)
    if sys.stdout.isatty():
        bar = _bar(what, total, BAR.replace("{postfix}", f" {word('responses')}{{postfix}}"), miniters=0, mininterval=0)
    every = LINE_EVERY_S if bar is None else SHOW_EVERY_S
    began = last = time.monotonic()
    if named and bar is None:
        last -= every - FIRST_LINE_S

    def tick() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last <= every:
            return
        last, (done, tokens) = now, progress()
        rate = f"{tokens / (now - began):,.0f} tok/s"
        if world_size() > 1:
            rate += f" {word('on this rank')}"
        if bar is not None:
            bar.set_postfix_str(rate, refresh=False)
            bar.update(done - bar.n)
        elif named and done >= TELLING * total:
            left = time_left((now - began) / done * (total - done))
            say(f"{what}: {done} / {total} responses, {rate}, {now - began:.0f} s, about {left} left")
        else:
            say(f"{what}: {done} / {total} responses, {rate}, {now - began:.0f} s")

    try:
        yield tick
    finally:
        if bar is not None:
            bar.close()

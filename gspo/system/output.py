"""Print without being ended by it: to a full disk, a pipe that nobody reads, or no standard output at all.

And without doing what a text says: answers and exceptions may hold escape sequences, which a terminal would obey.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Characters that a terminal obeys: controls but tab and line feed, and those that change the direction of text.
CONTROLS = [*range(9), *range(11, 32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_SHOWN = {c: f"\\x{c:02x}" if c < 256 else f"\\u{c:04x}" for c in CONTROLS}
_SHOWN_OF_PROGRAMS = {c: shown for c, shown in _SHOWN.items() if c != ord("\r")}  # progress bars return the carriage
_IN_JSON = {c: f"\\u{c:04x}" for c in CONTROLS}


def printable(text: str) -> str:
    r"""Return the text with control characters shown: `\x1b[2J` instead of a cleared screen."""
    return text.translate(_SHOWN)


def printable_json(text: str) -> str:
    """Return the same JSON without a control character, for those who print the file."""
    return text.translate(_IN_JSON)


class KeptStream:
    """Pass text on to a stream, control characters shown. What the stream does not take is lost, and `error` says why;
    the program goes on."""

    def __init__(self, stream: TextIO):
        self.stream, self.error = stream, None

    def write(self, text: str) -> int:
        self._attempt(lambda: self.stream.write(text.translate(_SHOWN_OF_PROGRAMS)))
        return len(text)

    def write_as_is(self, text: str) -> None:
        """Pass on what no text says: the movements of a progress bar."""
        self._attempt(lambda: self.stream.write(text))

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, action: Any) -> None:
        try:
            action()
        except OSError as e:
            self.error = e

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def kept_output() -> Iterator[None]:
    """Replace sys.stdout and sys.stderr by streams that raise no OSError; say at the end what was lost."""
    _open_missing()
    before = sys.stdout, sys.stderr
    out, errors = sys.stdout, sys.stderr = KeptStream(before[0]), KeptStream(before[1])
    for stream in before:
        if hasattr(stream, "reconfigure"):  # what the terminal's encoding lacks is shown as \\ud83d
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        out.flush()
        if out.error:
            reason = out.error.strerror or out.error
            errors.write(f"warning: standard output did not take all that was printed ({reason}).\n")
        errors.flush()
        sys.stdout, sys.stderr = before
        for stream in (out, errors):
            if stream.error:
                _discard(stream.stream)


def _open_missing() -> None:
    """Open /dev/null for the standard streams that whoever started this program has closed (`>&-`).

    A file of ours would get the number of such a stream, and libraries would print into it.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


def _discard(stream: TextIO) -> None:
    """Send what a stream still holds to /dev/null: Python's exit would fail at it."""
    with contextlib.suppress(OSError, ValueError):
        handle = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, stream.fileno())
        os.close(handle)

"""Write files and folders whole or not at all; append to files on a disk that is full now and then."""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gspo.system.output import printable_json

PART = ".part"  # ends the name of what is not finished; a run removes such leftovers when it starts


def _descriptor(path: Path) -> int | None:
    """Return the number of the open file of this process that a path such as /dev/stdout stands for; None otherwise."""
    for _ in range(40):  # as many links as Linux follows
        if os.path.realpath(path.parent) == f"/proc/{os.getpid()}/fd" and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / os.readlink(path)
    return None


def _takes_bytes_only(path: Path) -> bool:
    """Return whether a path names a device, a pipe or an open file such as /dev/stdout, which must not be replaced."""
    is_other = path.exists() and not path.is_file() and not path.is_dir()
    return is_other or _descriptor(path) is not None


@contextmanager
def replacing(path: Path, keep_unfinished: bool = False) -> Iterator[Path]:
    """Yield `<path>.part`, to write a file or a folder there; it becomes `path` if the block ends without an error.

    Until then `path` stays what it was; a folder can only replace an empty one. Of a link, what it points to is
    replaced. A device, a pipe or /dev/stdout is written to at the end, and stays what it is. After an error the part is
    removed, unless `keep_unfinished` and there is something in it. Several at once (contextlib.ExitStack): all are
    written before the first takes its name. An OSError names the path.
    """
    if _takes_bytes_only(path):
        with naming(path), tempfile.TemporaryDirectory() as scratch:
            yield (part := Path(scratch) / path.name)
            _send(part, path)
        return
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    part = path.with_name(path.name + PART)
    try:
        with naming(path):
            remove(part)
            yield part
            part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            if not keep_unfinished or part.stat().st_size == 0:
                remove(part)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError of the block that names none: the system's, for a disk that fills up, does not."""
    try:
        yield
    except OSError as e:
        if e.errno is not None and e.filename is None:
            e.filename = str(path)
        raise


def _send(part: Path, path: Path) -> None:
    """Append a file's bytes to a device, a pipe or an open file. OSError where nobody reads a pipe."""
    number = _descriptor(path)
    if number is None:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)  # waits for no reader
        os.set_blocking(handle, True)
    else:
        sys.stdout.flush()
        handle = os.dup(number)  # shares the place at which the next line goes
    with part.open("rb") as source, open(handle, "wb", buffering=0) as out:
        while chunk := memoryview(source.read(1 << 20)):
            while len(chunk):
                chunk = chunk[out.write(chunk) :]


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all. Half a character, which UTF-8 lacks, becomes `\\ud83d`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON Lines file, whole or not at all, without control characters."""
    with replacing(path) as part, part.open("w", encoding="utf-8", errors="backslashreplace") as out:
        for row in rows:
            out.write(printable_json(json.dumps(row, ensure_ascii=False, default=str)) + "\n")


def point_link(link: Path, target: Path) -> None:
    """Make `link` point to `target`, whatever it pointed to before."""
    part = link.with_name(link.name + PART)
    remove(part)
    part.symlink_to(target)
    part.replace(link)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if there is one.

    A folder is first renamed to `<path>.part`, so that a half-deleted one is never taken for a whole one.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path if path.name.endswith(PART) else path.rename(path.with_name(path.name + PART))
    shutil.rmtree(gone)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk (fsync)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class AppendedFile:
    """A file to append to. What the disk has no room for waits in memory, in order, until it has."""

    def __init__(self, path: Path):
        self.path, self.waiting = path, b""

    def append(self, data: bytes) -> OSError | None:
        """Append all of `data`, or nothing for now. Return the error if it has to wait."""
        self.waiting += data
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as f:
                end, left = f.tell(), memoryview(self.waiting)
                try:
                    while len(left):
                        left = left[f.write(left) :]
                except OSError:
                    f.truncate(end)
                    raise
        except OSError as e:
            return e
        self.waiting = b""
        return None

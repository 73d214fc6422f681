"""Write files and folders whole or not at all; append to files on a disk that is full now and then."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PART = ".part"  # ends the name of what is not finished; a run removes such leftovers when it starts


@contextmanager
def replacing(path: Path, keep_unfinished: bool = False) -> Iterator[Path]:
    """Yield `<path>.part`, to write a file or a folder there; it becomes `path` if the block ends without an error.

    Until then `path` stays what it was; a folder can only replace an empty one. After an error the part is removed,
    unless `keep_unfinished` and there is something in it. Several at once (contextlib.ExitStack): all are written
    before the first takes its name.
    """
    part = path.with_name(path.name + PART)
    remove(part)
    try:
        yield part
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            if not keep_unfinished or part.stat().st_size == 0:
                remove(part)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all. Half a character, which UTF-8 lacks, becomes `\\ud83d`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def point_link(link: Path, target: Path) -> None:
    """Make `link` point to `target`, whatever it pointed to before."""
    with replacing(link) as part:
        part.symlink_to(target)


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

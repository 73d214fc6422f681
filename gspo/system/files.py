"""Files that are whole or not there, and files that grow although the disk is full now and then."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

PART = ".part"  # ends the name of what is not finished; a run that starts removes such leftovers
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none."""
    part = path.with_name(path.name + PART)
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a whole file or none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def point_link(link: Path, target: Path) -> None:
    """`link` -> `target`, whatever it pointed to."""
    fresh = link.with_name(f".{link.name}{PART}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder: the folder first loses its name, so that half of it is never taken for it."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path if path.name.endswith(PART) else path.rename(path.with_name(path.name + PART))
    shutil.rmtree(gone)


def sync_folder(folder: Path) -> None:
    """Names in a folder, down to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Growing:
    """A file that is appended to. What finds no room waits in memory, in order, until there is some."""

    def __init__(self, path: Path):
        self.path, self.waiting = path, b""

    def append(self, data: bytes) -> OSError | None:
        """Append whole `data` or, for now, nothing; the reason, when it has to wait."""
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

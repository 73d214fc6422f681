"""Refuse in words what no path of a user may be: too long, half a character, a pipe that is waited for."""

import contextlib
import difflib
import os
import re
from pathlib import Path

from gspo.errors import UserError

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of Linux
RESERVED = 40  # bytes of a name that we append to it, such as `.part`


def check_path(text: str, what: str, written: bool = False) -> str:
    """Return a path that a user gave. UserError where no system could open it (too long, a NUL, half a character), or
    where it begins with the home folder of a user who does not exist.

    `what` names its place; `written`: other names are made of it by appending to it.
    """
    try:
        parts = [len(os.fsencode(part)) for part in text.split("/")]
    except UnicodeEncodeError as e:
        raise UserError(f"{what} = {text!r:.80}: a path cannot hold half a character.") from e
    if "\0" in text:
        raise UserError(f"{what} = {text!r:.80}: a path cannot hold a NUL character.")
    limit = LONGEST_NAME - (RESERVED if written else 0)
    if max(parts) > limit:
        raise UserError(f"{what} = {text[:40]!r}...: a name of {max(parts)} bytes is too long, {limit} is the most.")
    if sum(parts) + len(parts) > LONGEST_PATH:
        raise UserError(f"{what} = {text[:40]!r}...: a path of {sum(parts)} bytes is too long for the system.")
    if re.match(r"~[\w-]+(/|$)", os.path.expanduser(text)):
        raise UserError(f"{what} = {text!r}: there is no such user. A file or folder of that name is './{text}'.")
    with contextlib.suppress(OSError):
        if os.path.islink(text) and os.path.islink(os.path.realpath(text)):
            raise UserError(f"{what} = {text!r}: a link that leads back to itself.")
    return text


def home_path(path: str | Path) -> Path:
    """Return a path with `~` expanded; where there is no such user, as it is (pathlib's own raises RuntimeError)."""
    return Path(os.path.expanduser(path))


def mistyped_path(name: str) -> str:
    """Return why `owner/name`, which is not here, is a mistyped path rather than a name on the hub; "" where it is not.

    It is one where its first part is a folder here.
    """
    folder, _, rest = name.partition("/")
    if not rest or not os.path.isdir(folder):
        return ""
    near = difflib.get_close_matches(rest, sorted(os.listdir(folder)), n=1)
    guess = f"; do you mean {folder}/{near[0]}?" if near else "."
    return f"{folder} is a folder here, and has no {rest!r}{guess}"


def near_names(name: str) -> str:
    """Return which names beside a missing one are like it, or that its folder is missing too; "" where none is."""
    folder, last = os.path.split(name)
    if folder and not os.path.isdir(folder):
        return f" There is no folder {folder}."
    try:
        here = sorted(os.listdir(folder or "."))
    except OSError:
        return ""
    near = [other for other in here if os.path.splitext(other)[0] == last]
    near += [other for other in difflib.get_close_matches(last, here, n=3, cutoff=0.75) if other not in near]
    return f" Is {' or '.join(os.path.join(folder, other) for other in near[:3])} meant?" if near else ""


def require_file(path: Path, what: str) -> None:
    """Raise UserError where a path names a pipe, a device or a socket, of which some never end; OSError where it cannot
    be looked at."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{what} {path}: is a pipe or a device. Write its content to a file, and name that.")

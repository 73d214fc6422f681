"""Read the command line of a program, and name all flags that it does not have in one error."""

import argparse
import difflib
import re
import sys
from shlex import quote

from gspo.config_aliases import ALIASES
from gspo.errors import UserError
from gspo.foreign_settings import is_foreign
from gspo.read_config import LIKELY, find_parameter, near_parameters

EVERY = re.compile(".*")  # parameter
DASHES = "-–—"  # the long ones come from texts, in which `--` was made one
FLAG = re.compile(rf"[{DASHES}]+[^\W\d][^\s=]*(=.*)?", re.DOTALL)


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str] | None = None, parameters: re.Pattern[str] | None = None
) -> argparse.Namespace:
    """Parse flags and other arguments, in any order. UserError, which names all of them, where flags are unknown.

    `parameters`: those that the program takes as `section.key=value`, none by default.
    """
    given = sys.argv[1:] if argv is None else argv
    flags = [flag for action in parser._actions for flag in action.option_strings]
    unknown: list[str] = []
    written: dict[str, str] = {}  # flag -> the setting that it should be
    for i, text in enumerate(given[: given.index("--")] if "--" in given else given):
        flag, equals, value = text.partition("=")
        if not FLAG.fullmatch(text) or any(known.startswith(flag) for known in flags):
            continue
        if not equals:
            value = next((x for x in given[i + 1 : i + 2] if not x.startswith("-")), "VALUE")
        name = flag.lstrip(DASHES).replace("-", "_")
        if key := _parameter(name, parameters):
            written[flag] = quote(f"{key}={value}")
            continue
        near = _near(name, value, flags, parameters)
        if near or flag[0] == "-":  # what begins with a long dash may be anything
            unknown.append(flag + near)
    _refuse(unknown, written, parameters is not None)
    prefix = argparse._("usage: ")  # in the user's language; argparse itself takes off as much as `usage: ` is long
    parser.usage = parser.format_usage().removeprefix(prefix).rstrip()
    return parser.parse_intermixed_args(given)


def _refuse(unknown: list[str], written: dict[str, str], parameters: bool) -> None:
    """Raise UserError, one for all, where flags are unknown, or should be written as settings."""
    lists = "--help lists the flags, `python -m gspo.parameters` the parameters." if parameters else ""
    lists = lists or "--help lists the flags."
    flags, settings = ", ".join(written), " ".join(written.values())
    if unknown and written:
        raise UserError(
            f"command line: there is no flag {', '.join(unknown)}. And {flags}: parameters are no flags here (but of "
            f"train.sh); write {settings}. {lists}"
        )
    if unknown:
        raise UserError(f"command line: there is no flag {', '.join(unknown)}. {lists}")
    if written:
        raise UserError(
            f"command line: {flags}: parameters are no flags here (but of train.sh); write {settings}. {lists}"
        )


def _near(name: str, value: str, flags: list[str], parameters: re.Pattern[str] | None) -> str:
    """Return ` (--temperature?)`, what an unknown flag may be meant for: a flag, or else a setting; or ""."""
    names = {known.lstrip("-"): known for known in flags}
    near = [names[x] for x in difflib.get_close_matches(name, names, n=1, cutoff=LIKELY)]
    if not near and parameters:
        keys = [ALIASES.get(key, key) for key in near_parameters(name)]
        near = [f"{key}={value}" for key in keys if parameters.fullmatch(key)]
    return f" ({', '.join(near)}?)" if near else ""


def _parameter(name: str, parameters: re.Pattern[str] | None) -> str:
    """Return the parameter that a flag names, as it is written here, or "" where it names none that is taken."""
    if parameters is None or is_foreign(name):
        return name if parameters else ""
    try:
        key, inside = find_parameter(name, "command line")
    except UserError:
        return ""
    return ".".join((key, *inside)) if parameters.fullmatch(key) else ""

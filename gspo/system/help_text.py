"""Lay the text of `--help` out in the cells of the terminal."""

import argparse
from typing import Any

from gspo.system.cells import fold, width


class HelpText(argparse.RawDescriptionHelpFormatter):
    """Fold the description and the help of flags at the terminal's width, also in Chinese, of which argparse would
    take every character for one cell. Indented lines, which are commands, stay lines of their own."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(fold(line, width, " " * 8 * line.startswith(" ")) for line in _joined(text.split("\n")))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return fold(" ".join(text.split()), width).split("\n")

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None) -> str:
        prefix = argparse._("usage: ") if prefix is None else prefix
        cells = width(prefix)  # as many characters of one cell take its place while lines are indented
        return prefix + super()._format_usage(usage, actions, groups, "x" * cells)[cells:]


def _joined(lines: list[str]) -> list[str]:
    """Return the lines with those of a paragraph made one."""
    found: list[str] = []
    for line in lines:
        goes_on = bool(found and found[-1] and line) and not (line.startswith(" ") or found[-1].startswith(" "))
        if not goes_on:
            found.append(line)
            continue
        wide = width(found[-1][-1]) == 2 or width(line[0]) == 2  # Chinese has no spaces between words
        found[-1] += line if wide else f" {line}"
    return found

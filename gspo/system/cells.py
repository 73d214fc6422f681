"""Lay text out in the cells of a terminal, of which a Chinese character takes two: align columns, fold long lines."""

import re
import unicodedata

NOT_FIRST = "。，、；：？！）】」』》”’…,.;:?!)]}"  # characters with which no line begins
_PIECE = re.compile(r"\s+|\S+")


def width(text: str) -> int:
    """Return how many cells a text takes."""
    return sum(_cells(c) for c in text)


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def flush_left(text: str, cells: int) -> str:
    """Return the text with spaces behind it, up to so many cells."""
    return text + " " * (cells - width(text))


def flush_right(text: str, cells: int) -> str:
    """Return the text with spaces before it, up to so many cells."""
    return " " * (cells - width(text)) + text


def columns(rows: list[list[str]]) -> str:
    """Return rows as lines of aligned columns."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(flush_left, row, widths)).rstrip() for row in rows)


def fold(text: str, cells: int, indent: str = "") -> str:
    """Break the lines of a text that take more than `cells`, between words or at a Chinese character; what follows in
    a line of its own is indented. A word that is longer than a line stays whole."""
    return "\n".join(_folded(line, cells, indent) for line in text.split("\n"))


def _folded(line: str, cells: int, indent: str) -> str:
    if width(line) <= cells:
        return line
    lines, now = [], ""
    for piece in _pieces(line):
        if now.strip() and width((now + piece).rstrip()) > cells:
            lines.append(now.rstrip())
            now = indent
            piece = piece.lstrip()
        now += piece
    return "\n".join([*lines, now.rstrip()])


def _pieces(line: str) -> list[str]:
    """Return the parts of a line between which it may be broken: spaces, words, Chinese characters, each with the
    punctuation behind it."""
    found: list[str] = []
    for run in _PIECE.findall(line):
        if run.isspace():
            found.append(run)
            continue
        word = ""
        for c in run:
            wide = _cells(c) == 2
            if word and c not in NOT_FIRST and (wide or _cells(word[-1]) == 2) and word[-1] not in "（【「『《“‘":
                found.append(word)
                word = ""
            word += c
        found.append(word)
    return found

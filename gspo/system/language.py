"""Say what a user reads in the user's language: English, or Chinese by messages_zh.json.

Messages are written in English where they arise. What is printed passes through `translated`, which looks for the
entry whose text, with `{}` for what varies, is the message; what varies is translated in turn where it is a message
itself. A message without an entry stays English. GSPO_LANG=zh or en chooses; without it, the system's locale.
"""

import argparse
import functools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

CATALOGUE = Path(__file__).with_name("messages_zh.json")
PLACE = re.compile(r"\{([1-9]?)\}")
ERROR = "error: "
WORD = "[word] "  # before the words of tables and step lines: alone, they could be what varies in a message
DEEPEST = 8  # messages inside messages


class Entry(NamedTuple):
    """One message: a pattern of its English text, the longest part that does not vary, and the Chinese text."""

    pattern: re.Pattern[str]
    longest: str
    fixed: int  # characters that do not vary
    chinese: str


def language() -> str:
    """Return `zh` or `en`, by GSPO_LANG or the locale."""
    chosen = os.environ.get("GSPO_LANG", "").lower()
    if not chosen:
        chosen = next((os.environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(name)), "")
    return "zh" if chosen.lower().startswith("zh") else "en"


def translated(text: str) -> str:
    """Return a message in the user's language."""
    return text if language() == "en" else to_chinese(text)


def word(text: str) -> str:
    """Return a word of a table, a line of figures or a progress bar in the user's language."""
    return text if language() == "en" else _catalogue()[0].get(WORD + text, text)


def to_chinese(text: str, depth: int = 0) -> str:
    """Return a message in Chinese as far as the catalogue has it and what is inside it."""
    exact, entries = _catalogue()
    bare = text.strip()
    if not bare or depth > DEEPEST:
        return text
    before, _, after = text.partition(bare)
    if bare.startswith(ERROR):  # an entry that begins with what varies would take it for that
        return before + exact[ERROR] + to_chinese(bare.removeprefix(ERROR), depth + 1) + after
    if bare in exact:
        return before + exact[bare] + after
    for entry in entries:
        if entry.longest in bare and (found := entry.pattern.fullmatch(bare)):
            parts = [to_chinese(part, depth + 1) for part in found.groups()]
            return before + fill(entry.chinese, parts) + after
    for between in ("\n", " | "):
        if between in bare:
            return before + between.join(to_chinese(part, depth + 1) for part in bare.split(between)) + after
    return text


def fill(template: str, parts: list[str]) -> str:
    """Put parts in the places of a text: `{}` in their order, `{2}` the second."""
    following = iter(parts)
    return PLACE.sub(lambda place: parts[int(place[1]) - 1] if place[1] else next(following), template)


@functools.cache
def _catalogue() -> tuple[dict[str, str], list[Entry]]:
    """Return the messages that do not vary, and the others, those with the longest fixed text first."""
    exact, entries = {}, []
    for english, chinese in json.loads(CATALOGUE.read_text(encoding="utf-8")).items():
        parts = english.split("{}")
        if len(parts) == 1:
            exact[english] = chinese
            continue
        text = "(.*?)".join(map(re.escape, parts)).replace("(.*?)(.*?)", r"(\S*)(.*?)")  # a word, and what follows it
        longest = max(parts, key=len).strip()
        entries.append(Entry(re.compile(text, re.DOTALL), longest, sum(map(len, parts)), chinese))
    return exact, sorted(entries, key=lambda entry: -entry.fixed)


def translate_help() -> None:
    """Have argparse speak the user's language: descriptions, the help of flags, and its own words."""
    if language() == "en":
        return
    plain = argparse.ArgumentParser.format_help

    def format_help(parser: argparse.ArgumentParser) -> str:
        parser.description = parser.description and translated(parser.description)
        for action in parser._actions:
            action.help = action.help and translated(action.help)
        return plain(parser)

    argparse.ArgumentParser.format_help = format_help
    argparse._ = translated

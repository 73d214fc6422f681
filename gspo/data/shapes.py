"""Bring rows of other shapes into ours: the names and forms in which data sets hold prompts and ground truths.

- instruction, input, output, as Alpaca has them
- conversations of {from, value}, as ShareGPT has them, and messages of {role, content}: what the assistant says at the
  end is the ground truth, unless the row has another, and the solution
- question, problem, instruction or query, and answer, target, label, output, ...; in GSM8K's and MATH's rows as they
  are published the ground truth is a part of the answer or of the solution (schemas.py)

What is not GSM8K's, MATH's or ours is a guess, and is said: `fields_read` names the fields.
"""

import json
from collections.abc import Iterator
from typing import Any

from gspo.data.sources import Source
from gspo.errors import UserError

Row = dict[str, Any]
PROMPTS = ("question", "problem", "instruction", "query")
TRUTHS = ("answer", "final_answer", "expected_answer", "target", "label", "output", "completion")
CONVERSATIONS = ("conversations", "messages")
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}  # ShareGPT's -> ours


def fields_read(row: Row, guess_truth: bool = True) -> dict[str, tuple[str, ...]]:
    """Return which other fields are read as the prompt and as the ground truth: {"prompt": ("question",), ...}."""
    found: dict[str, tuple[str, ...]] = {}
    if row.get("prompt") is None:
        talk = next((name for name in CONVERSATIONS if row.get(name)), None)
        asked = next((name for name in PROMPTS if row.get(name) is not None), None)
        if talk:
            found["prompt"] = (talk,)
        elif asked:
            found["prompt"] = (asked, "input") if asked == "instruction" and row.get("input") else (asked,)
    if guess_truth and row.get("ground_truth") is None and row.get("reward_model") is None:
        answer = next((name for name in TRUTHS if row.get(name) is not None), None)
        if answer:
            found["ground_truth"] = (answer,)
        elif found.get("prompt", ("",))[0] in CONVERSATIONS:
            found["ground_truth"] = found["prompt"]
    return found


def with_our_fields(row: Row, place: str, guess_truth: bool = True) -> Row:
    """Return a row with `prompt`, `ground_truth` and perhaps `solution` from the fields that stand for them.

    UserError, which names the place, where a conversation is none.
    """
    found = fields_read(row, guess_truth)
    if not found:
        return row
    row = dict(row)
    asked = found.get("prompt", ())
    if asked and asked[0] in CONVERSATIONS:
        messages = _messages(row.pop(asked[0]), asked[0], place)
        last = messages[-1] if messages else {}
        if last.get("role") == "assistant" and isinstance(last.get("content"), str):
            messages = messages[:-1]
            row["solution"] = row.get("solution") or last["content"]
            if found.get("ground_truth") == asked:
                row["ground_truth"] = last["content"]
        row["prompt"] = messages
    elif asked:
        texts = [row.pop(name) for name in asked]
        for name, text in zip(asked, texts, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{place}: field {name!r} must be a text that is not empty, got {text!r:.80}.")
        row["prompt"] = "\n".join(text.strip() for text in texts)
    answer = found.get("ground_truth", asked)
    if answer != asked:
        row["ground_truth"] = row.pop(answer[0])
        if answer[0] in ("output", "completion") and isinstance(row["ground_truth"], str):
            row["solution"] = row.get("solution") or row["ground_truth"]
    return row


def _messages(talk: Any, name: str, place: str) -> list[Any]:
    """Return a conversation as messages of {role, content}; ShareGPT's turns are {from, value}."""
    talk = parsed(talk)
    if not isinstance(talk, list) or not all(isinstance(turn, dict) for turn in talk):
        raise UserError(f"{place}: field {name!r} must be a list of messages, got {talk!r:.80}.")
    return [
        {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")} if "from" in turn else turn
        for turn in talk
    ]


def parsed(value: Any) -> Any:
    """Return what a text of JSON holds where that is an object or a list of objects, as in tables; else the value."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if isinstance(found, dict) or (isinstance(found, list) and found and all(isinstance(x, dict) for x in found)):
            return found
    return value


def prompt_of(value: Any) -> Any:
    """Return a prompt: the messages that a text of JSON holds, else the value as it is."""
    found = parsed(value)
    return found if isinstance(found, list) else value


def read_as_messages(row: Row, messages: list[Row]) -> bool:
    """Return whether the prompt of a row is a text, and not the one that its messages begin with."""
    text = row["prompt"] if row.get("prompt") is not None else next((row[x] for x in PROMPTS if row.get(x)), None)
    if not isinstance(text, str) or text.lstrip()[:1] != "[":
        return False
    return not str(messages[0].get("content")).lstrip().startswith(text.strip())


class RenamedRows(Source):
    """A source whose fields `prompt` and `ground_truth` have the names that were configured (data.prompt_key, ...)."""

    def __init__(self, source: Source, prompt_key: str | None, truth_key: str | None):
        self.name, self._source = source.name, source
        self._keys = {"prompt": prompt_key, "ground_truth": truth_key}

    def __len__(self) -> int:
        return len(self._source)

    def place(self, i: int) -> str:
        return self._source.place(i)

    def __getitem__(self, i: int) -> Any:
        return self._renamed(self._source[i], i)

    def rows(self) -> Iterator[Any]:
        for i, row in enumerate(self._source.rows()):
            try:
                yield self._renamed(row, i)
            except UserError as e:
                yield e

    def _renamed(self, row: Any, i: int) -> Any:
        """Return a row under our names. UserError where it lacks a field that was configured."""
        if not isinstance(row, dict):
            return row
        row = dict(row)
        for ours, theirs in self._keys.items():
            if theirs is None or theirs == ours:
                continue
            setting = "data.prompt_key" if ours == "prompt" else "data.truth_key"
            if theirs not in row:
                raise UserError(f"{self.place(i)}: the row has no field {theirs!r} ({setting}); it has {keys_of(row)}.")
            if ours == "ground_truth":  # the one that was named counts
                row.pop("reward_model", None)
            row[ours] = row.pop(theirs)
        return row


def keys_of(row: Row) -> str:
    """Return the names of a row's fields that are not null, for messages."""
    names = [repr(name)[:40] for name, value in row.items() if value is not None]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "no field at all"

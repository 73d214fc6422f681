"""Bring a row's messages and tools into the chat template's form: all fields, no nulls, no images or sound."""

import difflib
import json
from typing import Any

from gspo.errors import UserError

Messages = list[dict[str, Any]]  # role, content, and whatever else a template reads: tool_calls, name, ...
Tools = list[dict[str, Any]]
TEXT_PARTS = (None, "text", "input_text", "output_text")  # types of content parts that are text
NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")  # columns that belong to a prompt as well


def read_messages(prompt: Any, place: str) -> Messages:
    """Return a prompt, a text or a list of messages, as messages. Raise UserError, which names the place.

    Nulls are dropped, as tables fill a field that only some messages have with them. Content parts are joined.
    """
    if isinstance(prompt, str):
        if not prompt or prompt.isspace():
            raise _error(prompt, place, "a text that is not empty")
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise _error(prompt, place, "a text, or a list of {role, content} messages")
    try:
        return [_message(message, place, number) for number, message in enumerate(prompt, 1)]
    except RecursionError:
        raise too_deep(place, "prompt") from None


def _message(message: Any, place: str, number: int) -> dict[str, Any]:
    """Return one message, its content a text, or missing beside other fields such as tool_calls."""
    if isinstance(message, dict) and message.get("role") is None:
        raise _missing("role", message, place, number)
    if not isinstance(message, dict) or not isinstance(message["role"], str):
        raise _error(message, place, "a text, or a list of {role, content} messages", number)
    if type(message.get("content")) is str and len(message) == 2:
        return message  # nearly all are like this
    refuse_other_media(message, f"{place}: field 'prompt', message {number}")
    message = without_nulls(message)
    content = message.get("content")
    if isinstance(content, dict | list):
        parts = content if isinstance(content, list) else [content]
        message["content"] = "".join(_part(part, place, number) for part in parts)
    elif content is None and (len(message) == 1 or message["role"] in ("user", "system") or _near("content", message)):
        raise _missing("content", message, place, number)
    elif not isinstance(content, str | None):
        raise _error(content, place, "a message whose content is a text, or a list of text parts", number)
    return message


def _part(part: Any, place: str, number: int) -> str:
    """Return the text of a content part. Raise UserError, which names its type, where it is none."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    raise UserError(
        f"{place}: field 'prompt', message {number}: a content part of type {kind!r} is not text, and only text can be "
        "trained on. Leave such rows out."
    )


def refuse_other_media(row: dict[str, Any], place: str) -> None:
    """Raise UserError where images, videos or sound belong to a row or a message: they would not be seen."""
    for name in NOT_TEXT:
        if row.get(name):
            raise UserError(
                f"{place}: field {name!r} is not empty, and only text can be trained on. Leave such rows out, or drop "
                "the field where the prompt can be answered without it."
            )


def read_tools(tools: Any, place: str) -> Tools | None:
    """Return a row's tools, a list of objects or its JSON text; None where there are none. Raise UserError."""
    given = tools
    if isinstance(tools, str) and tools.strip():
        try:
            given = json.loads(tools)
        except (ValueError, RecursionError):
            given = 0
    if given in (None, "", []) or (isinstance(given, str) and not given.strip()):
        return None
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise UserError(f"{place}: field 'tools' must be a list of objects, or its JSON text, got {tools!r:.80}.")
    try:
        return without_nulls(given)
    except RecursionError:
        raise too_deep(place, "tools") from None


def too_deep(place: str, field: str) -> UserError:
    """Return the error for a field in which lists or objects are nested hundreds deep."""
    return UserError(f"{place}: field {field!r} is nested too deep to be read.")


def without_nulls(value: Any) -> Any:
    """Return a copy without the keys whose value is null, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def question_of(messages: Messages) -> str:
    """Return what the user asked last, for tables; of a prompt without a user, its last text."""
    texts = [(m["role"], m["content"]) for m in messages if m.get("content")]
    asked = [text for role, text in texts if role == "user"] or [text for _, text in texts]
    return asked[-1] if asked else ""


def _near(field: str, message: dict[str, Any]) -> list[str]:
    """Return the key of a message that is the field's name misspelt, if there is one."""
    return difflib.get_close_matches(field, [str(key) for key in message], n=1, cutoff=0.7)


def _missing(field: str, message: dict[str, Any], place: str, number: int) -> UserError:
    near = "".join(f"; is {key!r} meant for it?" for key in _near(field, message))
    return UserError(f"{place}: field 'prompt', message {number} has no {field!r}, got {message!r:.80}{near or '.'}")


def _error(got: Any, place: str, expected: str, number: int | None = None) -> UserError:
    where = "" if number is None else f", message {number},"
    return UserError(
        f"{place}: field 'prompt'{where} must be {expected}, got {'nothing' if got is None else f'{got!r:.80}'}."
    )

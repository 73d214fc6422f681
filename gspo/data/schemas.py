r"""Read a row of any known schema.

- the original description's: `{"prompt": str, "ground_truth": str, "data_source": str}`
- verl's: `{"data_source", "prompt": [{"role", "content"}], "reward_model": {"ground_truth"}, "extra_info": {...}}`
- GSM8K's `{"question", "answer"}`, the answer ending in `#### 72`, and MATH's `{"problem", "solution"}` with `\boxed{}`
"""

import re
from collections.abc import Callable
from typing import Any

from gspo.errors import UserError

Row = dict[str, Any]
Messages = list[dict[str, str]]

ANNOTATION = re.compile(r"<<.*?>>")  # GSM8K's calculator notes: 48/2 = <<48/2=24>>24
FINAL = re.compile(r"^####\s*(-?[\d,.]*\d)\s*\Z", re.MULTILINE)
BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])")


def parse_row(row: Any, place: str) -> tuple[Messages, str, str, dict]:
    """Return (messages, ground_truth, data_source, extra_info) of a row of any schema; a null field counts as missing.

    Raise UserError, which names the place and the field, where the row is of no schema.
    """
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be an object with prompt, ground_truth and data_source, got {row!r:.80}.")
    prompt = row.get("prompt")
    if prompt is None:
        row = published_row(row, place)
        prompt = row.get("prompt")
    if isinstance(prompt, str):
        if not prompt or prompt.isspace():
            raise _field_error(row, place, "prompt", "a text that is not empty")
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = _messages(row, place)
    if row.get("reward_model") is not None:
        model = row["reward_model"]
        truth = model.get("ground_truth") if isinstance(model, dict) else None
        if not _is_truth(truth):
            raise _field_error(row, place, "reward_model", 'an object like {"style": "rule", "ground_truth": ...}')
    else:
        truth = row.get("ground_truth")
        if not _is_truth(truth):
            raise _field_error(row, place, "ground_truth", "a text or a number")
    source = row.get("data_source")
    if source is None:
        source = "unknown"
    elif not isinstance(source, str):
        raise _field_error(row, place, "data_source", "a text")
    extra = row.get("extra_info") or {}
    if not isinstance(extra, dict):
        raise _field_error(row, place, "extra_info", "an object")
    if row.get("solution") is not None:
        extra = {**extra, "solution": row["solution"]}
    return messages, str(truth), source, extra


def _is_truth(value: Any) -> bool:
    """Return whether the value is a text or a finite number; JSON's `true` and `NaN` are neither."""
    return isinstance(value, str) or (type(value) in (int, float) and value - value == 0)


def _field_error(row: Row, place: str, name: str, what: str) -> UserError:
    """Return the error that names place and field, what is expected and what is there."""
    got = f"{row[name]!r:.80}" if name in row else "nothing"
    return UserError(f"{place}: field {name!r} must be {what}, got {got}.")


def _messages(row: Row, place: str) -> Messages:
    """Return the prompt that is a list of {role, content} messages. Raise UserError for anything else."""
    prompt = row.get("prompt")
    ok = isinstance(prompt, list) and prompt
    ok = ok and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in prompt)
    ok = ok and all(isinstance(m.get("content"), str) for m in prompt)
    if not ok:
        raise _field_error(row, place, "prompt", "a text, or a list of {role, content} messages")
    return [{"role": m["role"], "content": m["content"]} for m in prompt]


def published_row(row: Row, place: str) -> Row:
    """Convert a row of GSM8K or MATH as they are published; return any other row as it is."""
    if row.get("question") is not None and row.get("answer") is not None:
        return gsm8k_row(row, place)
    if row.get("problem") is not None and row.get("solution") is not None:
        return math_row(row, place)
    return row


def text_field(row: Any, name: str, place: str) -> str:
    """Return the text of a field. Raise UserError, which names place and field, where it is missing or empty."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be an object with field {name!r}, got {row!r:.80}.")
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _field_error(row, place, name, "a text that is not empty")
    return value.strip()


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`, braces matched. MATH also writes `\fbox{...}` and `\boxed 5$`."""
    for box in reversed(list(BOX.finditer(text))):
        rest = text[box.end() :].lstrip()
        if not rest.startswith("{"):
            content = rest.split("$")[0].strip()
            if content:
                return content
            continue
        depth = 0
        # An escaped brace, as in \left\{, is a symbol and opens no level.
        for mark in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
            depth += {"{": 1, "}": -1}.get(mark[0], 0)
            if depth == 0 and mark[0] == "}":
                return rest[1 : mark.start()].strip() or None
    return None


def gsm8k_row(row: Any, place: str) -> Row:
    """Convert a row {question, answer} of GSM8K, whose answer ends in a line `#### <number>`."""
    question, answer = text_field(row, "question", place), text_field(row, "answer", place)
    final = FINAL.search(answer)
    if not final:
        raise UserError(f"{place}: field 'answer' must end in a line like '#### 72', it ends in {answer[-40:]!r}.")
    return {
        "prompt": question,
        "ground_truth": final[1].replace(",", ""),
        "data_source": "gsm8k",
        "solution": ANNOTATION.sub("", answer),
    }


def math_row(row: Any, place: str) -> Row:
    r"""Convert a row {problem, solution, level?, type?} of MATH, whose answer is in the solution's last \boxed{}."""
    problem, solution = text_field(row, "problem", place), text_field(row, "solution", place)
    boxed = last_boxed(solution)
    if boxed is None:
        raise UserError(
            f"{place}: field 'solution' must hold its answer in \\boxed{{}}, it ends in {solution[-40:]!r}."
        )
    converted = {"prompt": problem, "ground_truth": boxed, "data_source": "math", "solution": solution}
    extra = {name: row[name] for name in ("level", "type") if row.get(name) is not None}
    return {**converted, "extra_info": extra} if extra else converted


# name, as in `python -m gspo.convert_data NAME` -> converter of a row
FORMATS: dict[str, Callable[[Any, str], Row]] = {"gsm8k": gsm8k_row, "math": math_row}

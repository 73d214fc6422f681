r"""Read a row of any known schema.

- the original description's: `{"prompt": str, "ground_truth": str, "data_source": str}`
- verl's: `{"data_source", "prompt": [{"role", "content"}], "reward_model": {"ground_truth"}, "extra_info": {...}}`
- GSM8K's `{"question", "answer"}`, the answer ending in `#### 72`, and MATH's `{"problem", "solution"}` with `\boxed{}`
- other names and forms of the same: shapes.py

Every other column goes into extra_info.
"""

import contextlib
import marshal
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from gspo.data.messages import NOT_TEXT, Messages, read_messages, refuse_other_media, too_deep
from gspo.data.shapes import keys_of, parsed, prompt_of, with_our_fields
from gspo.errors import UserError

Row = dict[str, Any]
SURROGATE = re.compile(rb"\xed[\xa0-\xbf]")  # begins the UTF-8 of one, if it had any
MARSHAL = 2  # the version without references: the bytes depend on the values alone
AS_IT_STANDS = 'To give such a text as it stands, write it as [{"role": "user", "content": TEXT}].'
EXACT = 2**53  # a float of this size or more may not be the integer that was meant

# All that is read of a row under our names.
FIELDS = {"prompt", "ground_truth", "data_source", "reward_model", "extra_info", "solution", "tools", *NOT_TEXT}

ANNOTATION = re.compile(r"<<.*?>>")  # GSM8K's calculator notes: 48/2 = <<48/2=24>>24
FINAL = re.compile(r"^####\s*(-?[\d,.]*\d)\s*\Z", re.MULTILINE)
BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])")


def parse_row(row: Any, place: str, needs_truth: bool = True, stored: bool = False) -> tuple[Messages, Any, str, dict]:
    """Return (messages, ground_truth, data_source, extra_info) of a row of any schema; a null field counts as missing.

    The ground truth is a text, numbers included, or the list, object, truth value or date that the row holds; None
    where there is none and none is needed. Of a row that held responses (`stored`) it is not guessed. Raise UserError,
    which names the place and the field, where the row is of no schema.
    """
    if not isinstance(row, dict):
        cure = " A file that holds one list is named .json." if isinstance(row, list) and row else ""
        raise UserError(
            f"{place}: a row must be an object with prompt, ground_truth and data_source, got {row!r:.80}.{cure}"
        )
    refuse_half_characters(row, place)
    refuse_other_media(row, place)
    row = with_our_fields(published_row(row, place), place, guess_truth=not stored)
    require_prompt(row, place)
    prompt = prompt_of(row["prompt"])
    try:
        messages = read_messages(prompt, place)
    except UserError as e:
        if prompt is row["prompt"]:
            raise
        raise UserError(f"{e} The prompt is a JSON text of messages. {AS_IT_STANDS}") from e
    if row.get("reward_model") is not None:
        model = parsed(row["reward_model"])
        truth = ground_truth_of(model.get("ground_truth")) if isinstance(model, dict) else None
        if truth is None:
            raise _field_error(row, place, "reward_model", 'an object like {"style": "rule", "ground_truth": ...}')
        beside = ground_truth_of(row.get("ground_truth"))
        if beside is not None and beside != truth:
            raise UserError(
                f"{place}: the row has two ground truths, {truth!r:.60} in 'reward_model' and {beside!r:.60} in "
                "'ground_truth'. Leave one of the two out."
            )
    else:
        truth = ground_truth_of(row.get("ground_truth"))
        if truth is None and (needs_truth or row.get("ground_truth") is not None):
            error = _field_error(
                row, place, "ground_truth", "a text, a finite number, or a list, object or truth value"
            )
            raise UserError(
                f"{error} The row has {keys_of(row)}; data.truth_key names the one that is meant, and a function of "
                "your own (reward.path) needs none."
            )
    source = row.get("data_source")
    if source is None:
        source = "unknown"
    elif not isinstance(source, str):
        raise _field_error(row, place, "data_source", "a text")
    extra = parsed(row.get("extra_info")) or {}
    if not isinstance(extra, dict):
        raise _field_error(row, place, "extra_info", "an object")
    if not row.keys() <= FIELDS:
        extra = {name: x for name, x in row.items() if name not in FIELDS and x is not None} | extra
    if row.get("solution") is not None:
        extra = {**extra, "solution": row["solution"]}
    return messages, truth, source, extra


def require_prompt(row: Row, place: str) -> None:
    """Raise UserError, which says how another field is named as the prompt, where a row has none."""
    if row.get("prompt") is None:
        raise UserError(
            f"{place}: field 'prompt' must be a text, or a list of {{role, content}} messages, got nothing. The row "
            f"has {keys_of(row)}; data.prompt_key names the one that is meant."
        )


def ground_truth_of(value: Any) -> Any:
    """Return a ground truth as the reward function gets it: numbers as text, `72.0` as "72"; None where it is none.

    A column of whole numbers with a hole in it is a column of floats; nobody's function compares with "72.0".
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return value
    if value - value != 0:  # neither NaN nor infinite
        return None
    whole = value == int(value) and (isinstance(value, int | Decimal) or abs(value) < EXACT)
    return str(int(value)) if whole else str(value)


def bytes_of(value: Any) -> bytes:
    """Return bytes that are the same for equal rows, in every process."""
    try:
        return marshal.dumps(value, MARSHAL)
    except ValueError:  # a date, a decimal
        return repr(value).encode("utf-8", "backslashreplace")


def refuse_half_characters(row: Row, place: str) -> None:
    """Raise UserError where a text of the row holds a lone surrogate, which is in no text file and no vocabulary."""
    with contextlib.suppress(ValueError):  # dates and decimals are looked through below
        data = marshal.dumps(row, MARSHAL)
        if b"\xed" not in data or not SURROGATE.search(data):  # the first is the faster question
            return
    for name, value in row.items():
        try:
            found = half_character(name) or half_character(value)
        except RecursionError:
            raise too_deep(place, name) from None
        if found:
            raise UserError(
                f"{place}: field {name!r} holds half a character ({found!r}), as is left where a text is cut inside an "
                "emoji. Repair the text or leave the row out."
            )


def half_character(value: Any) -> str:
    """Return the first lone surrogate in a text, or in the texts of a list or an object; else an empty text."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as e:
                return value[e.start]
    elif isinstance(value, dict):
        return next((found for pair in value.items() for item in pair if (found := half_character(item))), "")
    elif isinstance(value, list | tuple):
        return next((found for item in value if (found := half_character(item))), "")
    return ""


def _field_error(row: Row, place: str, name: str, what: str) -> UserError:
    """Return the error that names place and field, what is expected and what is there."""
    got = f"{row[name]!r:.80}" if name in row else "nothing"
    return UserError(f"{place}: field {name!r} must be {what}, got {got}.")


def published_row(row: Row, place: str) -> Row:
    """Convert a row of GSM8K or MATH as they are published; return any other row as it is."""
    if not is_published(row):
        return row
    name = "gsm8k" if row.get("question") is not None else "math"
    converted = {key: x for key, x in FORMATS[name](row, place).items() if key != "extra_info"}
    return converted | {key: x for key, x in row.items() if x is not None and key not in PUBLISHED[name]}


def is_published(row: Row) -> bool:
    """Return whether a row is GSM8K's or MATH's as they are published: the answer has a mark that says where it is."""
    if any(row.get(name) is not None for name in ("prompt", "ground_truth", "reward_model")):
        return False
    question, answer, problem, solution = (row.get(name) for name in ("question", "answer", "problem", "solution"))
    if question is not None:
        return isinstance(answer, str) and "####" in answer
    return problem is not None and solution is not None and (answer is None or bool(BOX.search(str(solution))))


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
PUBLISHED = {"gsm8k": ("question", "answer"), "math": ("problem", "solution")}  # the fields that they convert

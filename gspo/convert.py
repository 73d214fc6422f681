"""GSM8K and MATH as they are published -> the rows that `train.py` reads.

    python -m gspo.convert gsm8k IN OUT.json [--limit K] [--holdout K]
    python -m gspo.convert math  IN OUT.json [--limit K] [--holdout K]

IN is JSONL, a JSON list or parquet. `--holdout K` writes the last K rows to OUT_test.json, not to OUT.json.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from gspo.data import read_rows
from gspo.errors import UserError
from gspo.progress import track

Row = dict[str, Any]

ANNOTATION = re.compile(r"<<.*?>>")  # GSM8K's calculator: 48/2 = <<48/2=24>>24
FINAL = re.compile(r"^####\s*(-?[\d,.]*\d)\s*\Z", re.MULTILINE)
BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])")


def text_field(row: Any, name: str, place: str) -> str:
    """The text of a field that must be there; UserError names place and field."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be an object with field {name!r}, got {row!r:.80}.")
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        got = f"{value!r:.80}" if name in row else "nothing"
        raise UserError(f"{place}: field {name!r} must be a text that is not empty, got {got}.")
    return value.strip()


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, braces matched; MATH also has `\fbox{...}` and `\boxed 5$`."""
    for box in reversed(list(BOX.finditer(text))):
        rest = text[box.end() :].lstrip()
        if not rest.startswith("{"):
            content = rest.split("$")[0].strip()
            if content:
                return content
            continue
        depth = 0
        # An escaped brace, as in \left\{, is a symbol and does not nest.
        for mark in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
            depth += {"{": 1, "}": -1}.get(mark[0], 0)
            if depth == 0 and mark[0] == "}":
                return rest[1 : mark.start()].strip() or None
    return None


def gsm8k_row(row: Any, place: str) -> Row:
    """{question, answer} -> our row; the answer's last line is `#### <number>`."""
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
    r"""{problem, solution, level?, type?} -> our row; the answer is in the solution's last \boxed{}."""
    problem, solution = text_field(row, "problem", place), text_field(row, "solution", place)
    boxed = last_boxed(solution)
    if boxed is None:
        raise UserError(
            f"{place}: field 'solution' must hold its answer in \\boxed{{}}, it ends in {solution[-40:]!r}."
        )
    converted = {"prompt": problem, "ground_truth": boxed, "data_source": "math", "solution": solution}
    extra = {name: row[name] for name in ("level", "type") if row.get(name) is not None}
    return {**converted, "extra_info": extra} if extra else converted


FORMATS: dict[str, Callable[[Any, str], Row]] = {"gsm8k": gsm8k_row, "math": math_row}


def write_files(files: dict[Path, list[Row]]) -> None:
    """Write JSON lists, one row a line: all of the files or none."""
    parts = {path: path.with_name(path.name + ".part") for path in files}
    try:
        for path, rows in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            parts[path].write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        for path, part in parts.items():
            os.replace(part, path)
    except (OSError, UnicodeEncodeError) as e:
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}.") from e
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()


def convert(kind: str, source: Path, out: Path, limit: int | None = None, holdout: int = 0) -> dict[Path, int]:
    """Convert one file; returns the rows of each file written. Raises UserError, and then nothing was written."""
    if out.suffix != ".json":
        raise UserError(f"OUT {out} must end in .json: it becomes one JSON list.")
    places = islice(read_rows(source), limit)
    rows = [FORMATS[kind](row, place) for place, row in track(places, f"converting {source}")]
    if holdout >= len(rows):
        raise UserError(f"{source} gives {len(rows)} rows; with --holdout {holdout} none is left to train on.")
    cut = len(rows) - holdout
    files = {out: rows[:cut]}
    if holdout:
        files[out.with_name(f"{out.stem}_test.json")] = rows[cut:]
    write_files(files)
    return {path: len(part) for path, part in files.items()}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rows: 1, 2, ...")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gspo.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=FORMATS, help="what IN holds")
    parser.add_argument("source", metavar="IN", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--limit", metavar="K", type=_count, help="read only the first K rows")
    parser.add_argument("--holdout", metavar="K", type=_count, default=0, help="put the last K rows into OUT_test.json")
    args = parser.parse_args(argv)
    try:
        written = convert(args.kind, args.source, args.out, args.limit, args.holdout)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    for path, rows in written.items():
        print(f"{path}: {rows} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())

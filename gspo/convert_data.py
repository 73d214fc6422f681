"""Convert GSM8K and MATH as they are published into the rows that `train.py` reads, and split them.

    python -m gspo.convert_data gsm8k IN OUT.json [--limit K] [--holdout K]
    python -m gspo.convert_data math  IN OUT.json [--limit K] [--holdout K]

IN is JSONL, a JSON list, parquet or a Hugging Face data set. `--holdout K` writes the last K rows to OUT_test.json, not
to OUT.json. Training also reads both formats as they are published.
"""

import argparse
import contextlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

from gspo.command_line import parse_arguments
from gspo.data.schemas import FORMATS, Row
from gspo.data.sources import open_source
from gspo.errors import UserError
from gspo.system.console import say, track
from gspo.system.files import replacing
from gspo.system.help_text import HelpText
from gspo.system.program import guarded


def write_files(files: dict[Path, list[Row]]) -> None:
    """Write JSON lists, one row per line: all of the files or none. Raise UserError where one cannot be written."""
    try:
        with contextlib.ExitStack() as all_or_none:
            for path, rows in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
                part = all_or_none.enter_context(replacing(path))
                part.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    except (OSError, UnicodeEncodeError) as e:
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}.") from e


def _converted(kind: str, row: Any, place: str) -> Row:
    """Return the converted row. Raise UserError."""
    if isinstance(row, UserError):  # a line that cannot be read
        raise row
    return FORMATS[kind](row, place)


def convert(kind: str, source: Path, out: Path, limit: int | None = None, holdout: int = 0) -> dict[Path, int]:
    """Convert one file. Return {file: rows written}. Raise UserError, and then nothing was written."""
    if out.suffix != ".json":
        raise UserError(f"OUT {out} must end in .json: one JSON list is written.")
    opened = open_source(source)
    found = track(islice(opened.rows(), limit), f"converting {source}", min(len(opened), limit or len(opened)))
    rows = [_converted(kind, row, opened.place(i)) for i, row in enumerate(found)]
    if holdout >= len(rows):
        raise UserError(f"{source} gives {len(rows)} rows; with --holdout {holdout} none is left to train on.")
    cut = len(rows) - holdout
    files = {out: rows[:cut]}
    if holdout:
        files[out.with_name(f"{out.stem}_test.json")] = rows[cut:]
    write_files(files)
    return {path: len(part) for path, part in files.items()}


def _count(text: str) -> int:
    """Read a number of rows from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rows: 1, 2, ...")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gspo.convert_data", description=__doc__, formatter_class=HelpText)
    parser.add_argument("kind", choices=FORMATS, help="what IN holds")
    parser.add_argument("source", metavar="IN", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--limit", metavar="K", type=_count, help="read only the first K rows")
    parser.add_argument("--holdout", metavar="K", type=_count, default=0, help="put the last K rows into OUT_test.json")
    args = parse_arguments(parser, argv)
    for path, rows in convert(args.kind, args.source, args.out, args.limit, args.holdout).items():
        say(f"{path}: {rows} rows")


if __name__ == "__main__":
    guarded(main)

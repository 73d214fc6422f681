"""Read rows from JSONL, JSON lists, CSV, parquet and Hugging Face data sets, one by one where the format allows.

To add a file format, write a `Source`, or a function from a path to one, and name it in one line of `READERS`.
"""

import csv
import glob
import importlib
import json
import os
import re
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from gspo.errors import UserError
from gspo.read_paths import check_path, mistyped_path, near_names, require_file
from gspo.read_yaml import without_repeats

BOM = b"\xef\xbb\xbf"
NOT_READ = (".tsv", ".txt", ".gz", ".zip", ".zst", ".xlsx")  # refused, where READERS has no line for it
BATCH = 1024  # Arrow rows converted at a time when all rows are read
# a folder or owner/name, then :config, then @split
DATASET = re.compile(r"(?P<path>[^:@]+)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")
decode_json = json.JSONDecoder(object_pairs_hook=without_repeats).raw_decode  # json.loads without its preparations
KINDS = " JSON, JSONL, CSV and parquet are read, and data sets of the hub, named OWNER/NAME: openai/gsm8k:main."
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:.*|@.*)?|\w[\w.-]*[:@].*")  # OWNER/NAME; a bare name may be a mistyped file


class Source(Sequence):
    """Rows of one file or data set, by number: `len(source)` and `source[i]` are what a new one must define.

    `source[i]` is a dict as gspo/data/schemas.py reads it; a row that cannot be read raises UserError.
    """

    name: str  # for messages: the path, or the name of the data set
    unit = "row"

    def place(self, i: int) -> str:
        """Return where row `i` is, for messages."""
        return f"{self.name}, {self.unit} {i + 1}"

    def rows(self) -> Iterator[Any]:
        """Yield every row in order. A row that cannot be read is yielded as its UserError: reading may go on."""
        for i in range(len(self)):
            try:
                yield self[i]
            except UserError as e:
                yield e


class JsonLines(Source):
    """One JSON object per line. Only byte offsets are kept; a line is read and parsed when its row is."""

    unit = "line"

    def __init__(self, path: Path):
        self.name = str(path)
        self._fd: int | None = None
        self._starts = array("q")  # byte offset of every row, then the end of the file
        self._blanks = array("q")  # of every blank line, the number of rows before it
        with path.open("rb") as file:
            offset = len(BOM) if file.read(len(BOM)) == BOM else 0
            file.seek(offset)
            for line in file:
                if line.isspace():
                    self._blanks.append(len(self._starts))
                else:
                    self._starts.append(offset)
                offset += len(line)
        self._starts.append(offset)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def place(self, i: int) -> str:
        return f"{self.name}, line {self._line(i)}"

    def _line(self, i: int) -> int:
        """Return the line number of row `i`, blank lines counted."""
        return i + 1 + (bisect_right(self._blanks, i) if self._blanks else 0)

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < len(self._starts) - 1:
            raise IndexError(i)
        start = self._starts[i]
        try:
            if self._fd is None:
                self._fd = os.open(self.name, os.O_RDONLY)
            data = os.pread(self._fd, self._starts[i + 1] - start, start)
        except OSError as e:
            raise UserError(f"data file {self.name}: {e.strerror or e}.") from e
        try:
            text = data.strip().decode()  # blank lines may follow
            row, end = decode_json(text)
            return row if end == len(text) else json.loads(text)  # whose error says what is wrong
        except UnicodeDecodeError as e:
            raise UserError(not_utf8(Path(self.name), start + e.start, f"line {self._line(i)}, ")) from e
        except (ValueError, RecursionError) as e:
            raise UserError(f"{self.place(i)} is not valid JSON: {e}.") from e

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fd": None}  # another process opens the file itself

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            os.close(self._fd)


class JsonList(Source):
    """A JSON list of objects, kept in memory."""

    def __init__(self, path: Path):
        self.name = str(path)
        try:
            self._rows = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=without_repeats)
        except UnicodeDecodeError as e:
            raise UserError(not_utf8(path, e.start)) from e
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} is not valid JSON: {e}. If it has one object per line, name it .jsonl.") from e
        if not isinstance(self._rows, list):
            kind = type(self._rows).__name__
            lists = [key for key, value in self._rows.items() if isinstance(value, list)] if kind == "dict" else []
            inside = f" Its key {lists[0]!r} holds a list: write that one to a file." if lists else ""
            raise UserError(f"{path} holds a JSON {kind}; it must hold a list of rows: [{{...}}, ...].{inside}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Any:
        return self._rows[i]


class CsvRows(Source):
    """Rows of a CSV file, kept in memory: texts by the names in its first line; an empty cell is none."""

    def __init__(self, path: Path):
        self.name = str(path)
        csv.field_size_limit(2**31 - 1)
        self._rows: list[dict[str, str] | UserError] = []
        self._lines = array("q")  # the line that each row begins on
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, strict=True)
                names = self._names(next(reader, []))
                line = reader.line_num
                for cells in reader:
                    if cells:
                        self._lines.append(line + 1)
                        self._rows.append(self._row(names, cells, f"{path}, line {line + 1}"))
                    line = reader.line_num
        except UnicodeDecodeError as e:
            raise UserError(not_utf8(path, e.start)) from e
        except csv.Error as e:
            raise UserError(f"{path}, line {reader.line_num} is not valid CSV: {e}.") from e

    def _names(self, names: list[str]) -> list[str]:
        """Return the names of the columns. UserError where one is empty or there twice."""
        for name in names:
            if not name.strip() or names.count(name) > 1:
                what = f"names the column {name!r} twice" if name.strip() else "has a column without a name"
                raise UserError(f"{self.name}: the first line {what}. It must name every column, each once.")
        return names

    def _row(self, names: list[str], cells: list[str], place: str) -> "dict[str, str] | UserError":
        """Return one row, or its error."""
        if len(cells) != len(names):
            return UserError(
                f"{place}: {len(cells)} cells, but the first line names {len(names)} columns. A text with a comma or a "
                'line break stands in quotes: "a, b".'
            )
        return {name: cell for name, cell in zip(names, cells, strict=True) if cell != ""}

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, i: int) -> str:
        return f"{self.name}, line {self._lines[i]}"

    def __getitem__(self, i: int) -> Any:
        row = self._rows[i]
        if isinstance(row, UserError):
            raise row
        return row


class ArrowRows(Source):
    """Rows of an Arrow table, kept as it is: `table` is a pyarrow.Table, or a data set in the format "arrow"."""

    def __init__(self, name: str, table: Any):
        self.name, self._table = name, table

    def __len__(self) -> int:
        return len(self._table)

    def _slice(self, start: int, count: int) -> list[Any]:
        """Return `count` rows as dicts."""
        found = self._table.slice(start, count) if hasattr(self._table, "slice") else self._table[start : start + count]
        return found.to_pylist(maps_as_pydicts="strict")  # a map is an object, and has no key twice

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        try:
            return self._slice(i, 1)[0]
        except (
            ValueError,
            KeyError,
            OSError,
        ) as e:  # a key twice in a map, text that is not UTF-8, a broken cache file
            raise UserError(f"{self.place(i)} cannot be read: {' '.join(str(e).split()):.200}.") from e

    def rows(self) -> Iterator[Any]:
        for start in range(0, len(self), BATCH):
            try:
                rows = self._slice(start, min(BATCH, len(self) - start))
            except (ValueError, KeyError, OSError):
                rows = [self._or_error(i) for i in range(start, min(start + BATCH, len(self)))]
            yield from rows

    def _or_error(self, i: int) -> Any:
        """Return a row, or its error."""
        try:
            return self[i]
        except UserError as e:
            return e


def not_utf8(path: Path, byte: int, line: str = "") -> str:
    """Return the error of a file that is no UTF-8 text, with the way to convert it."""
    with path.open("rb") as file:
        start = file.read(2)
    kind = "UTF-16" if start in (b"\xff\xfe", b"\xfe\xff") else "KIND"
    return (
        f"{path} is not UTF-8 text ({line}byte {byte}). Convert it: iconv -f {kind} -t UTF-8 {quote(str(path))} > NEW"
        f"{path.suffix}" + ("." if kind != "KIND" else ", where KIND is how it was saved, such as GB18030 or LATIN1.")
    )


def read_parquet(path: Path) -> Source:
    """Read a parquet file. Raise UserError where it is none, or pyarrow is missing."""
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow.") from e
    try:
        return ArrowRows(str(path), pyarrow.parquet.read_table(path))
    except pyarrow.ArrowException as e:
        raise UserError(f"{path} is not a parquet file: {e}.") from e


# File name ending -> what reads such a file; a file with any other ending is read as a JSON list.
READERS: dict[str, Callable[[Path], Source]] = {
    ".json": JsonList,
    ".jsonl": JsonLines,
    ".csv": CsvRows,
    ".parquet": read_parquet,
}


def open_source(name: str | Path, split: str = "train") -> Source:
    """Open a file, a folder or a data set `owner/name[:config][@split]`. Raise UserError where it cannot be read."""
    path = Path(check_path(str(name), "data file"))
    suffix = path.suffix.lower()
    try:
        require_file(path, "data file")
        if not path.is_file() and (path.is_dir() or suffix not in READERS):
            return _open_dataset(str(name), split)
        if suffix in NOT_READ and suffix not in READERS:
            raise UserError(
                f"data file {path}: {suffix} is not read; JSON (a list of rows), JSONL, CSV and parquet are."
            )
        path.stat()  # so that a missing file is named as such: pyarrow's error is only its name
        return READERS.get(suffix, JsonList)(path)
    except OSError as e:
        raise UserError(
            f"data file {path}: {e.strerror or e}.{several_names(str(name)) or near_names(str(name))}"
        ) from e


def several_names(name: str) -> str:
    """Return how several files are named, where the name of a missing one seems to stand for several; else ""."""
    inner = name.strip("[]")
    parts = [part.strip("'\"") for part in re.split(r"[,\s]+", inner) if part]
    if len(parts) > 1 and all(Path(part).suffix for part in parts):
        return f" Several files are a list: {quote('[' + ', '.join(parts) + ']')}."
    if "*" in inner or "?" in inner:
        found = sorted(glob.glob(parts[0]))
        named = f", for example {quote('[' + ', '.join(found[:3]) + ']')}" if found else ""
        return f" Patterns are not replaced here; name the files in a list{named}."
    return ""


def _open_dataset(name: str, split: str) -> Source:
    """Open a folder or a name of the Hugging Face hub with `datasets`; code that comes with a data set never runs."""
    given = {"path": name} if Path(name).is_dir() else (m.groupdict() if (m := DATASET.fullmatch(name)) else {})
    path = given.get("path", name)
    is_folder = Path(path).is_dir()
    if not is_folder and (not given or not HUB_ID.fullmatch(name) or several_names(name)):
        raise UserError(f"data file {name}: No such file.{several_names(name) or near_names(name) + KINDS}")
    if not is_folder and (why := mistyped_path(path)):
        raise UserError(f"data file {name}: No such file: {why} To read a data set of that name: `hf download` it.")
    kind = "is a folder" if is_folder else "is no file here"
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as e:
        raise UserError(
            f"data file {name}: {kind}, and reading it as a data set needs `pip install datasets`. Give a "
            ".json, .jsonl or .parquet file, or install it."
        ) from e
    if not sys.stdout.isatty():
        datasets.disable_progress_bars()
    split = given.get("split") or split
    try:
        data = datasets.load_dataset(path, given.get("config"), split=split)
    except Exception as e:  # the library, the hub and the network raise dozens of kinds
        reason = " ".join(str(e).split())[:300].rstrip(".")
        raise UserError(
            f"data file {name}: {kind}, and its split {split!r} cannot be loaded as a data set ({reason}). "
            "Give a file, or name configuration and split as in openai/gsm8k:main@train."
        ) from e
    return ArrowRows(name if given.get("split") else f"{name}@{split}", data.with_format("arrow"))

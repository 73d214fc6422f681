"""Rows of files and data sets by number: JSONL by byte offsets, JSON, parquet, folders through `datasets`."""

import json
import pickle
import random
import sys
import tracemalloc

import pytest

from gspo.data import sources
from gspo.data.schemas import parse_row
from gspo.data.sources import ArrowRows, JsonLines, JsonList, Source, open_source
from gspo.errors import UserError

BOM = b"\xef\xbb\xbf"
TEXTS = ["plain", "解方程：x + 5 = 12", "🧮 \U0001f468‍\U0001f469", 'quo"te\\', "a b c\x85d", "line\nbreak", "\ud800"]


def row(text, i=0):
    return {"prompt": text, "ground_truth": str(i), "data_source": "x"}


@pytest.fixture()
def lines(tmp_path):
    def lines(data: bytes):
        (tmp_path / "rows.jsonl").write_bytes(data)
        return JsonLines(tmp_path / "rows.jsonl")

    return lines


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("start", [b"", BOM, b"\n", BOM + b"\r\n \t\n"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b"\r\n \x0c\r\n\n"])
@pytest.mark.parametrize("last", [True, False])
def test_offsets_whatever_the_file_looks_like(lines, ascii, start, end, last):
    rows = [row(t, i) for i, t in enumerate(TEXTS[: None if ascii else -1])]
    encoded = [json.dumps(r, ensure_ascii=ascii).encode() for r in rows]
    source = lines(start + end.join(encoded) + (end if last else b""))
    assert len(source) == len(rows)
    assert [source[i] for i in range(len(rows))] == list(source.rows()) == rows
    per_row = end.count(b"\n")
    first = 1 + start.count(b"\n")
    assert [source.place(i) for i in range(len(rows))] == [
        f"{source.name}, line {first + per_row * i}" for i in range(len(rows))
    ]


@pytest.mark.parametrize("data", [b"", BOM, b"\n\n", BOM + b" \r\n"])
def test_a_file_without_rows(lines, data):
    assert len(lines(data)) == 0 and list(lines(data).rows()) == []


def test_random_access_is_sequential_access_also_in_another_process(lines):
    source = lines(b"".join(json.dumps(row("y" * (i % 97), i)).encode() + b"\n" for i in range(2000)))
    rows = list(source.rows())
    places = list(range(2000))
    random.Random(0).shuffle(places)
    assert [source[i] for i in places] == [rows[i] for i in places]
    for i in (-1, 2000):
        with pytest.raises(IndexError):
            source[i]
    sent = pickle.dumps(source)  # after the file has been opened here
    del source  # which closes it
    copy = pickle.loads(sent)
    assert [copy[i] for i in places] == [rows[i] for i in places]


@pytest.mark.slow
def test_only_offsets_are_kept(tmp_path):
    path, count = tmp_path / "rows.jsonl", 200_000
    with path.open("w") as file:
        file.writelines(json.dumps(row("x" * 200, i)) + "\n" for i in range(count))
    assert path.stat().st_size > 40e6
    tracemalloc.start()
    source = JsonLines(path)
    for _ in source.rows():
        pass
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == count and kept < 12 * count and peak < 20 * count


def test_a_bad_line_is_named_and_the_reader_goes_on(lines):
    count = 150_000
    data = b"".join(b'{"prompt": "%d"}\n' % i for i in range(count - 1)) + b'{"prompt": \n{"prompt": "end"}\n'
    found = list(lines(data).rows())
    assert [i for i, r in enumerate(found) if isinstance(r, UserError)] == [count - 1]
    assert f"rows.jsonl, line {count} is not valid JSON: Expecting value" in str(found[count - 1])
    assert found[count] == {"prompt": "end"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": 1} {"b": 2}', "line 2 is not valid JSON: Extra data"),
        (b'{"a": 1}]', "line 2 is not valid JSON: Extra data"),
        (b"[" * 100_000, "line 2 is not valid JSON: "),
        (b"1" * 5000, "line 2 is not valid JSON: "),
        ("größer".encode("latin-1"), "is not UTF-8 text (line 2, byte 5)"),
    ],
)
def test_what_is_wrong_with_a_line(lines, line, said):
    with pytest.raises(UserError) as e:
        lines(b"{}\n" + line + b"\n")[1]
    assert said in str(e.value) and "rows.jsonl" in str(e.value)


def test_a_file_that_goes_away_before_it_is_opened_again(lines, tmp_path):
    source = lines(b"{}\n")
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="data file .*rows.jsonl: No such file"):
        source[0]


def test_a_new_format_is_one_class_and_one_line(tmp_path, monkeypatch):
    class Lines(Source):
        def __init__(self, path):
            self.name, self._lines = str(path), path.read_text().splitlines()

        def __len__(self):
            return len(self._lines)

        def __getitem__(self, i):
            return {"prompt": self._lines[i], "ground_truth": "1"}

    monkeypatch.setitem(sources.READERS, ".txt", Lines)
    (tmp_path / "rows.txt").write_text("a\nb\n")
    found = open_source(tmp_path / "rows.txt")
    assert [row["prompt"] for row in found.rows()] == ["a", "b"] and found.place(1) == f"{found.name}, row 2"


def test_the_suffix_decides_the_format(tmp_path):
    for name, kind in (("a.json", JsonList), ("a.JSONL", JsonLines), ("none", JsonList)):
        (tmp_path / name).write_text("[]")
        assert type(open_source(tmp_path / name)) is kind
    for name in ("a.tsv", "a.TXT", "a.jsonl.gz"):
        (tmp_path / name).write_text("[]")
        with pytest.raises(UserError, match="is not read; JSON .a list of rows., JSONL, CSV and parquet are"):
            open_source(tmp_path / name)


# ---- Arrow ----


def test_parquet_rows_one_by_one_and_in_batches(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [row(TEXTS[i % 6], i) for i in range(2500)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=300)
    source = open_source(tmp_path / "rows.parquet")
    assert list(source.rows()) == rows and len(source) == 2500
    assert [source[i] for i in (2499, 0, 1024)] == [rows[i] for i in (2499, 0, 1024)]
    assert source.place(2499) == f"{tmp_path / 'rows.parquet'}, row 2500"
    assert pickle.loads(pickle.dumps(source))[7] == rows[7]


def test_an_arrow_row_that_cannot_be_read_is_named():
    pyarrow = pytest.importorskip("pyarrow")
    bad = pyarrow.array([b"good", b"gr\xf6\xdfer", b"end"]).view(pyarrow.string())
    found = list(ArrowRows("t.parquet", pyarrow.table({"prompt": bad})).rows())
    assert found[0] == {"prompt": "good"} and found[2] == {"prompt": "end"}
    assert "t.parquet, row 2 cannot be read" in str(found[1])


@pytest.fixture()
def folder(tmp_path, monkeypatch):
    """A local data set with the splits train (3 rows) and test (2)."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mine"
    folder.mkdir()
    for split, texts in (("train", "abc"), ("test", "de")):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row(t)) + "\n" for t in texts))
    return folder


def test_a_local_data_set_folder(folder):
    source = open_source(str(folder), "train")
    assert [r["prompt"] for r in source.rows()] == [source[i]["prompt"] for i in range(3)] == list("abc")
    assert source.place(0) == f"{folder}@train, row 1"
    assert [r["prompt"] for r in open_source(str(folder), "test").rows()] == list("de")
    source = open_source(f"{folder}@test", "train")  # what the name says goes first
    assert [r["prompt"] for r in source.rows()] == list("de") and source.place(1) == f"{folder}@test, row 2"
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


def test_a_split_that_a_data_set_does_not_have(folder):
    with pytest.raises(UserError) as e:
        open_source(str(folder), "validation")
    assert str(e.value).startswith(f"data file {folder}: is a folder, and its split 'validation' cannot be loaded")
    assert "@train" in str(e.value) and "\n" not in str(e.value)


def test_names_of_data_sets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or [][1])
    for name in ("openai/gsm8k", "openai/gsm8k:main", "openai/gsm8k:main@train", "squad@validation[:10%]"):
        with pytest.raises(UserError, match="is no file here, and its split .* cannot be loaded"):
            open_source(name, "test")
    assert asked == [
        (("openai/gsm8k", None), {"split": "test"}),
        (("openai/gsm8k", "main"), {"split": "test"}),
        (("openai/gsm8k", "main"), {"split": "train"}),
        (("squad", None), {"split": "validation[:10%]"}),
    ]


def test_without_datasets_a_name_is_neither_file_nor_data_set(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"openai/gsm8k: is no file here, and reading it as a data set needs `pip install datasets`"
    ):
        open_source("openai/gsm8k")


def test_a_mistyped_name_in_a_folder_that_is_here_is_no_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    with pytest.raises(UserError, match="data is a folder here, and has no 'gsm8'; do you mean data/gsm8k?"):
        open_source("data/gsm8@train")


@pytest.mark.parametrize("name", ["no.jsonl", "no/such/folder/rows", "../rows", "no.parquet", "a b"])
def test_a_missing_file_is_not_looked_for_elsewhere(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="data file .*: No such file"):
        open_source(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.jsonl,b.json", "Several files are a list: '[a.jsonl, b.json]'"),
        ("a.jsonl b.json c.parquet", "Several files are a list: '[a.jsonl, b.json, c.parquet]'"),
        ("['a.jsonl' b.json]", "Several files are a list: '[a.jsonl, b.json]'"),
        ("[part*.jsonl]", "Patterns are not replaced here; name the files in a list, for example '[part1.jsonl, part2"),
        ("no/*.jsonl", "Patterns are not replaced here; name the files in a list."),
        ("part?.jsonl", "for example '[part1.jsonl, part2.jsonl]'"),
    ],
)
def test_one_name_for_several_files_is_answered_with_a_list(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    for file in ("part1.jsonl", "part2.jsonl"):
        (tmp_path / file).write_text("")
    with pytest.raises(UserError) as e:
        open_source(name)
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("r.jsonl", "utf-16", r"not UTF-8 text \(line 1, byte 0\).*iconv -f UTF-16 -t UTF-8 .*r.jsonl > NEW.jsonl.$"),
        ("r.json", "utf-16", r"not UTF-8 text \(byte 0\).*iconv -f UTF-16"),
        ("r.jsonl", "gb18030", "iconv -f KIND .* where KIND is how it was saved"),
    ],
)
def test_text_of_another_encoding_is_refused_with_the_way_to_convert_it(tmp_path, name, kind, said):
    (tmp_path / name).write_bytes('[{"prompt": "\u89e3"}]\n'.encode(kind))
    with pytest.raises(UserError, match=said):
        open_source(tmp_path / name)[0]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("r.json", '{"data": [{"prompt": "a"}]}', "must hold a list of rows.* Its key 'data' holds a list"),
        ("r.json", '{"version": 1}', r"must hold a list of rows: \[\{\.\.\.\}, \.\.\.\]\.$"),
        ("r.json", '{"prompt": "a"}\n{"prompt": "b"}', "If it has one object per line, name it .jsonl"),
        ("r.jsonl", '[{"prompt": "a"}]', "A file that holds one list is named .json"),
    ],
)
def test_rows_in_another_form_are_refused_with_the_right_one(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        parse_row(open_source(tmp_path / name)[0], "here")

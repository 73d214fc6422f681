"""Published rows become ours; a malformed row is named and nothing is written."""

import json
from pathlib import Path

import pytest

from gspo.convert_data import convert, main
from gspo.data.schemas import last_boxed, parse_row
from gspo.errors import UserError

NATALIA = {
    "question": "Natalia sold clips to 48 friends, then half as many. How many in all?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72.\n#### 72",
}
FACTORY = {"question": "How much is it?", "answer": "It is 109.2 million.\n#### -109,200,000"}
MATH = {
    "problem": r"What is half of $\frac{1}{2}$?",
    "solution": r"Half of it is \boxed{wrong}, no, $\boxed{\frac{1}{4}}$.",
    "level": "Level 2",
    "type": "Prealgebra",
}


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_gsm8k_row(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", NATALIA, FACTORY)
    out = tmp_path / "new" / "folder" / "out.json"
    assert convert("gsm8k", source, out) == {out: 2}
    natalia, factory = read(out)
    assert natalia == {
        "prompt": NATALIA["question"],
        "ground_truth": "72",
        "data_source": "gsm8k",
        "solution": "She sold 48/2 = 24 clips.\nIn all 48+24 = 72.\n#### 72",
    }
    assert factory["ground_truth"] == "-109200000"
    assert factory["solution"].endswith("\n#### -109,200,000")


def test_math_row_and_what_training_reads_of_it(tmp_path):
    out = tmp_path / "out.json"
    convert("math", write_jsonl(tmp_path / "in.jsonl", MATH), out)
    [row] = read(out)
    messages, truth, source, extra = parse_row(row, "here")
    assert messages == [{"role": "user", "content": MATH["problem"]}]
    assert (truth, source) == (r"\frac{1}{4}", "math")
    assert extra == {"level": "Level 2", "type": "Prealgebra", "solution": MATH["solution"]}


def test_level_and_type_are_optional(tmp_path):
    rows = ({"problem": "p", "solution": r"\boxed{1}"}, {"problem": "p", "solution": r"\boxed{1}", "level": None})
    convert("math", write_jsonl(tmp_path / "in.jsonl", *rows), tmp_path / "out.json")
    assert all("extra_info" not in row for row in read(tmp_path / "out.json"))


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{72}", "72"),
        (r"\boxed{1}, then \boxed{ 2 }.", "2"),
        (r"\boxed{\frac{a_{1}}{\sqrt{b^{2}}}} and {more}", r"\frac{a_{1}}{\sqrt{b^{2}}}"),
        (r"\boxed{\text{a \boxed{b}} c}", "b"),
        (r"$\boxed{\left\{ x : x > 0 \right.}$", r"\left\{ x : x > 0 \right."),
        (r"$\boxed{\{1, 2\}}$", r"\{1, 2\}"),
        (r"it is $\boxed 5$ apples", "5"),
        (r"\fbox{7}", "7"),
        (r"$\boxed{3}$ and $\boxed{4", "3"),
        (r"\boxed{}", None),
        (r"\boxedness{3}", None),
        ("72", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_limit_is_taken_first_then_the_last_rows_are_held_out(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(5)]
    source = write_jsonl(tmp_path / "in.jsonl", *rows, "not read: beyond the limit")
    argv = ["gsm8k", str(source), str(tmp_path / "d.json"), "--limit", "5", "--holdout", "2"]
    main(argv)
    assert [row["prompt"] for row in read(tmp_path / "d.json")] == ["q0", "q1", "q2"]
    assert [row["prompt"] for row in read(tmp_path / "d_test.json")] == ["q3", "q4"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.json", "d_test.json", "in.jsonl"]


@pytest.mark.parametrize(
    ("kind", "row", "field"),
    [
        ("gsm8k", {"question": "q"}, "'answer'"),
        ("gsm8k", {"question": " ", "answer": "#### 1"}, "'question'"),
        ("gsm8k", {"question": "q", "answer": 72}, "'answer'"),
        ("gsm8k", {"question": "q", "answer": "It is 72."}, "'answer'"),
        ("gsm8k", {"question": "q", "answer": "#### 72\nor so"}, "'answer'"),
        ("gsm8k", ["q", "a"], "'question'"),
        ("math", {"problem": None, "solution": r"\boxed{1}"}, "'problem'"),
        ("math", {"problem": "p", "solution": r"It is \boxed{1"}, "'solution'"),
        ("gsm8k", '{"question": ', "JSON"),
    ],
)
def test_malformed_row_is_named_and_nothing_is_written(kind, row, field, tmp_path):
    good = {**NATALIA, **MATH}
    source = write_jsonl(tmp_path / "in.jsonl", good, "", row)
    with pytest.raises(UserError) as failed:
        main([kind, str(source), str(tmp_path / "new" / "out.json"), "--holdout", "1"])
    error = str(failed.value)
    assert f"{source}, line 3" in error and field in error and "\n" not in error
    assert list(tmp_path.iterdir()) == [source]


def test_a_failing_write_leaves_the_old_files(tmp_path):
    half_a_character = {"question": "\ud83d", "answer": "#### 1"}  # JSON allows it, UTF-8 does not
    source = write_jsonl(tmp_path / "in.jsonl", NATALIA, half_a_character)
    out = tmp_path / "out.json"
    out.write_text("old")
    with pytest.raises(UserError, match=r"out_test\.json"):
        convert("gsm8k", source, out, holdout=1)
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.json"]


@pytest.mark.parametrize(
    ("out", "holdout", "message"),
    [("out.jsonl", 0, "must end in .json"), ("out.json", 1, "none is left to train on")],
)
def test_impossible_requests(out, holdout, message, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", NATALIA)
    with pytest.raises(UserError, match=message):
        convert("gsm8k", source, tmp_path / out, holdout=holdout)
    assert list(tmp_path.iterdir()) == [source]


def test_a_missing_file_is_one_paragraph(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl"):
        main(["math", str(tmp_path / "none.jsonl"), str(tmp_path / "out.json")])
    assert not list(tmp_path.iterdir())

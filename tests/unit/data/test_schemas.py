"""Published rows are read as they are; a null field is a field that is not there; mistakes name place and field."""

from decimal import Decimal

import pytest

from gspo.data.schemas import gsm8k_row, math_row, parse_row
from gspo.errors import UserError

GSM8K = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24\n#### 1,072"}
MATH = {"problem": "Half of it?", "solution": r"It is \boxed{\frac{1}{4}}.", "level": "Level 2", "type": "Algebra"}


def test_a_gsm8k_row_as_published():
    messages, truth, source, extra = parse_row(GSM8K, "here")
    assert messages == [{"role": "user", "content": "How many?"}]
    assert (truth, source, extra) == ("1072", "gsm8k", {"solution": "48/2 = 24\n#### 1,072"})


def test_a_math_row_as_published():
    messages, truth, source, extra = parse_row({**MATH, "answer": "0.25", "unique_id": "a/1.json"}, "here")
    assert messages == [{"role": "user", "content": "Half of it?"}]
    assert (truth, source) == (r"\frac{1}{4}", "math")
    assert extra == {
        "level": "Level 2",
        "type": "Algebra",
        "solution": MATH["solution"],
        "answer": "0.25",
        "unique_id": "a/1.json",
    }


@pytest.mark.parametrize(("row", "convert"), [(GSM8K, gsm8k_row), (MATH, math_row)])
def test_training_reads_what_the_converter_writes(row, convert):
    assert parse_row(row, "here") == parse_row(convert(row, "here"), "here")


def test_a_prompt_goes_before_the_published_fields():
    row = {**GSM8K, "prompt": "mine", "ground_truth": "5"}
    assert parse_row(row, "here")[:2] == ([{"role": "user", "content": "mine"}], "5")


def test_null_is_absent_as_in_tables_of_mixed_rows():
    nulls = dict.fromkeys(("prompt", "ground_truth", "data_source", "reward_model", "extra_info", "problem"))
    assert parse_row({**nulls, **GSM8K}, "here") == parse_row(GSM8K, "here")
    row = {"prompt": "p", "ground_truth": "1"}
    assert parse_row({**nulls, "solution": None, **row}, "here") == parse_row(row, "here")
    assert parse_row(row, "here")[2:] == ("unknown", {})


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"question": "q", "answer": "#### seventy"}, "'answer'"),
        ({"question": " ", "answer": "#### 72"}, "'question'"),
        ({"question": "q"}, "field 'ground_truth' must be"),
        ({"title": "q", "ground_truth": "72"}, "The row has 'title', 'ground_truth'; data.prompt_key names"),
        ({"prompt": "q", "gold": "72"}, "The row has 'prompt', 'gold'; data.truth_key names"),
        ({"problem": "p", "solution": "no box"}, "'solution'"),
        ({"problem": 5, "solution": r"\boxed{1}"}, "'problem'"),
        ({"instruction": "p", "input": 5, "output": "1"}, "field 'input'"),
        ({"conversations": "hello", "answer": "1"}, "field 'conversations' must be a list of messages"),
        ({"conversations": [{"from": None, "value": "x"}], "answer": "1"}, "message 1 has no 'role'"),
    ],
)
def test_a_row_that_is_nearly_published_names_the_field(row, field):
    with pytest.raises(UserError) as e:
        parse_row(row, "x.jsonl, line 7")
    assert str(e.value).startswith("x.jsonl, line 7: ") and field in str(e.value)


@pytest.mark.parametrize("truth", [float("nan"), float("inf"), None, Decimal("NaN")])
def test_a_ground_truth_is_no_null_and_finite(truth):
    with pytest.raises(UserError, match="field 'ground_truth' must be a text, a finite number"):
        parse_row({"prompt": "x", "ground_truth": truth}, "here")
    with pytest.raises(UserError, match="field 'reward_model' must be"):
        parse_row({"prompt": "x", "reward_model": {"ground_truth": truth}}, "here")


@pytest.mark.parametrize(("one", "other"), [("7", "8"), (7, "8"), (["7"], "7"), ("7", True)])
def test_a_row_has_one_ground_truth(one, other):
    row = {"prompt": "x?", "reward_model": {"ground_truth": one}, "ground_truth": other}
    with pytest.raises(UserError, match="here: the row has two ground truths, .* Leave one of the two out"):
        parse_row(row, "here")


@pytest.mark.parametrize(("one", "other"), [("7", "7"), (7.0, "7"), (["a"], ["a"]), ("7", None)])
def test_the_same_ground_truth_twice_is_one(one, other):
    row = {"prompt": "x?", "reward_model": {"ground_truth": one}, "ground_truth": other}
    assert parse_row(row, "here")[1] in ("7", ["a"])

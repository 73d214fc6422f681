"""Prompts and ground truths under other names and in other forms; what is a guess is said."""

import json

import pytest
from row_files import GOOD

from gspo.data.prompts import load_splits
from gspo.data.schemas import parse_row
from gspo.data.sources import open_source
from gspo.errors import UserError
from gspo.models.loading import load_model_config
from gspo.read_config import load_config
from gspo.types import Prompt

USER, SYSTEM = {"role": "user", "content": "x?"}, {"role": "system", "content": "Be brief."}
SHAREGPT = [{"from": "human", "value": "x?"}, {"from": "gpt", "value": "7"}]


def asked(*messages):
    return [{"role": role, "content": content} for role, content in messages]


@pytest.fixture()
def splits(tmp_path, tokenizer, write):
    """Survey rows as training does -> the prompts."""

    def splits(rows, *overrides, name="rows.jsonl"):
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        cfg = load_config(None, [f"data.train_files={write(text, name)}", *overrides])
        return load_splits(cfg, tokenizer, load_model_config(None)).train

    return splits


@pytest.fixture()
def own(tmp_path):
    """The setting of a reward function of one's own."""
    (tmp_path / "mine.py").write_text("def compute_score(solution_str, ground_truth):\n    return 1.0\n")
    return f"reward.path={tmp_path}/mine.py"


@pytest.mark.parametrize(
    ("row", "messages", "truth", "extra"),
    [
        ({"question": "x?", "answer": "5"}, [USER], "5", {}),
        ({"question": "x?", "answer": 5.0}, [USER], "5", {}),
        ({"question": "x?", "answer": ["5", "five"]}, [USER], ["5", "five"], {}),
        ({"question": "x?", "ground_truth": "5", "answer": "6"}, [USER], "5", {"answer": "6"}),
        ({"problem": "x?", "answer": "5", "solution": "So 5."}, [USER], "5", {"solution": "So 5."}),
        ({"query": "x?", "target": {"a": 1}}, [USER], {"a": 1}, {}),
        ({"prompt": "x?", "label": 0}, [USER], "0", {}),
        ({"prompt": "x?", "completion": "5"}, [USER], "5", {"solution": "5"}),
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, asked(("user", "Add.\n1 1")), "2", {"solution": "2"}),
        ({"instruction": "x?", "input": "", "output": "2"}, [USER], "2", {"input": "", "solution": "2"}),
        ({"conversations": SHAREGPT}, [USER], "7", {"solution": "7"}),
        ({"conversations": json.dumps(SHAREGPT)}, [USER], "7", {"solution": "7"}),
        ({"conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT], "answer": "8"}, [SYSTEM, USER], "8",
         {"solution": "7"}),
        ({"conversations": SHAREGPT * 2}, asked(("user", "x?"), ("assistant", "7"), ("user", "x?")), "7",
         {"solution": "7"}),
        ({"messages": [USER, {"role": "assistant", "content": "7"}]}, [USER], "7", {"solution": "7"}),
        ({"messages": [SYSTEM, USER], "ground_truth": "7"}, [SYSTEM, USER], "7", {}),
        ({"prompt": json.dumps([SYSTEM, USER]), "ground_truth": "7"}, [SYSTEM, USER], "7", {}),
        ({"prompt": "[1, 2] has how many?", "ground_truth": "2"}, asked(("user", "[1, 2] has how many?")), "2", {}),
        ({"prompt": "x?", "ground_truth": "7", "extra_info": '{"a": 1}', "b": 2}, [USER], "7", {"a": 1, "b": 2}),
        ({"prompt": "x?", "reward_model": '{"ground_truth": "7"}', "a": None}, [USER], "7", {}),
    ],
)  # fmt: skip
def test_a_row_of_another_shape_is_read(row, messages, truth, extra):
    assert parse_row(row, "here") == (messages, truth, "unknown", extra)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "x?", "answer": "5"}], "are read 'question' as prompt, 'answer' as ground_truth (first: "),
        ([GOOD, {"instruction": "a", "input": "b", "output": "5"}], "'instruction' and 'input' as prompt, 'output' as"),
        ([{"conversations": SHAREGPT}], "'conversations' as prompt, 'conversations' as ground_truth"),
        ([{"prompt": "x?", "label": 1}], "are read 'label' as ground_truth"),
        ([GOOD], ""),
        ([{"question": "x?", "answer": "It is 5.\n#### 5"}], ""),
        ([{"problem": "x?", "solution": "\\boxed{5}", "level": 5}], ""),
    ],
)
def test_what_is_read_for_what_is_said_once(splits, capsys, rows, said):
    splits([*rows, *rows])
    out = capsys.readouterr().out
    assert said in out and out.count("data.prompt_key and data.truth_key name other") == bool(said)


def test_fields_can_be_named(splits):
    row = {"prompt": "not me", "text": "x?", "gold": {"a": [1]}, "ground_truth": "not me"}
    with pytest.raises(UserError, match="'ground_truth' is a dict"):
        splits([row], "data.prompt_key=text", "data.truth_key=gold")
    (prompt,) = splits([{**row, "gold": 5}], "data.prompt_key=text", "data.truth_key=gold")
    assert (prompt.text, prompt.ground_truth) == ("x?", "5")
    verl = {"prompt": [USER], "reward_model": {"ground_truth": "1"}, "gold": "2"}
    assert splits([verl], "data.truth_key=gold")[0].ground_truth == "2"
    for key in ("prompt_key", "truth_key"):
        with pytest.raises(
            UserError, match=rf"line 1: the row has no field 'txt' \(data.{key}\); it has 'prompt', 'text'"
        ):
            splits([row], f"data.{key}=txt")


def test_other_columns_go_into_extra_info(splits, own, capsys):
    rows = [{**GOOD, "level": 3, "extra_info": {"a": 1}, "topic": None}]
    (prompt,) = splits(rows, own)
    assert isinstance(prompt, Prompt) and prompt.extra_info == {"a": 1, "level": 3}
    assert "'level' (first: " in (out := capsys.readouterr().out) and "go into extra_info" in out


@pytest.mark.parametrize("missing", [{}, {"ground_truth": None}, {"reward_model": None, "ground_truth": None}])
def test_a_function_of_ones_own_needs_no_ground_truth(splits, own, capsys, missing):
    (first, second) = splits([{"prompt": "x?", **missing}, GOOD], own)
    assert (first.ground_truth, second.ground_truth) == (None, "2")
    assert "line 1: there is no ground truth; the reward function gets None" in capsys.readouterr().out
    with pytest.raises(UserError, match="line 1: field 'ground_truth' must be .* needs none"):
        splits([{"prompt": "x?", **missing}, GOOD])
    with pytest.raises(UserError, match="field 'ground_truth' must be .* got nan"):
        splits([{"prompt": "x?", "ground_truth": float("nan")}], own)


# ---- CSV ----


def test_a_table_of_commas_is_read(splits, tmp_path):
    text = 'question,answer,level\n"a, ""b""\nc?",72.0,\n\nd?,8,hard\n'
    first, second = splits("\ufeff" + text, name="rows.csv")
    assert (first.text, first.ground_truth, first.extra_info) == ('a, "b"\nc?', "72.0", {})
    assert (second.text, second.ground_truth, second.extra_info) == ("d?", "8", {"level": "hard"})
    source = open_source(tmp_path / "rows.csv")
    assert [source.place(i).rpartition(", ")[2] for i in range(2)] == ["line 2", "line 5"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,prompt\na,b\n", "the first line names the column 'prompt' twice"),
        ("prompt,\na,b\n", "has a column without a name"),
        ("prompt,ground_truth\n1, 2, and?,7\n", "line 2: 4 cells, but the first line names 2 columns. .* in quotes"),
        ("prompt,ground_truth\na\n", "line 2: 1 cells, but"),
        ('prompt,ground_truth\n"a,7\n', "is not valid CSV"),
        ("prompt;ground_truth\na;7\n", "line 2: field 'prompt' must be .* The row has 'prompt;ground_truth'"),
        ("prompt,ground_truth\na,\n", "line 2: field 'ground_truth' must be .* got nothing"),
        ("", "no prompts in"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(splits, text, said):
    with pytest.raises(UserError, match=said):
        splits(text, name="rows.csv")


# ---- one file twice ----


@pytest.mark.parametrize("other", ["{0}", "{0}/../rows.jsonl", "{1}"])
def test_a_file_that_is_named_twice_is_said(splits, tmp_path, capsys, other):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    (tmp_path / "other.jsonl").write_text(json.dumps(GOOD))
    first = tmp_path / "rows.jsonl"
    again = other.format(first, tmp_path / "link.jsonl").replace("rows.jsonl/..", ".")
    assert len(splits([GOOD], f"data.train_files=[{first}, {tmp_path}/other.jsonl, {again}]")) == 3
    assert "data.train_files names one file twice" in capsys.readouterr().out

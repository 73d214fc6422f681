"""Prompts of rows of both schemas, and mistakes that are named by file, row and field."""

import copy
import json
import pickle
import sys
import tracemalloc
from pathlib import Path

import pytest
from row_files import GOOD, lines_of

from gspo.data.encoding import Encoder, encode
from gspo.data.prompts import Prompts, load_survey
from gspo.data.row_checker import RowChecker
from gspo.data.schemas import parse_row
from gspo.data.sources import open_source
from gspo.errors import UserError
from gspo.types import Prompt

VERL_ROW = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"split": "train", "index": 9},
}


def load_prompts(files, tokenizer, *, max_prompt_length, overlong="error", limit=None, vocab_size=None):
    checker = RowChecker(Encoder(tokenizer, vocab_size=vocab_size), max_prompt_length, only_texts=True)
    return load_survey(files, checker, overlong, limit=limit).prompts


@pytest.fixture()
def load(tokenizer):
    def load(*files, max_prompt_length=100, **options):
        return list(load_prompts(list(files), tokenizer, max_prompt_length=max_prompt_length, **options))

    return load


def ids_of(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


# ---- the two schemas, the three formats ----


def test_the_example_row_of_the_original_description(write, load, tokenizer):
    text = '[\n  {\n    "prompt": "解方程：x + 5 = 12",\n    "ground_truth": "7",\n'
    text += '    "data_source": "math_reasoning"\n  }\n]\n'
    ids = ids_of(tokenizer, "<|user|>解方程：x + 5 = 12<|assistant|>")
    assert load(write(text)) == [Prompt(0, ids, "解方程：x + 5 = 12", "7", "math_reasoning", {})]


def test_a_verl_row(write, load, tokenizer):
    ids = ids_of(tokenizer, "<|system|>Be brief.<|user|>2 + 2?<|assistant|>")
    extra = {"ability": "math", "split": "train", "index": 9}
    assert load(write([VERL_ROW])) == [Prompt(0, ids, "2 + 2?", "4", "openai/gsm8k", extra)]


def test_jsonl_with_empty_lines_holds_the_same_as_json(write, load):
    lines = "\n".join(["", json.dumps(GOOD), "  ", json.dumps(VERL_ROW), ""])
    assert load(write(lines, "rows.jsonl")) == load(write([GOOD, VERL_ROW]))


def test_parquet_holds_the_same_as_json(tmp_path, write, load):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([VERL_ROW]), tmp_path / "rows.parquet")
    assert load(str(tmp_path / "rows.parquet")) == load(write([VERL_ROW]))
    with pytest.raises(UserError, match="bad.parquet is not a parquet file"):
        load(write(b"PAR?", "bad.parquet"))


def test_parquet_without_pyarrow_says_what_to_install(write, load, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"rows\.parquet: .*pip install pyarrow"):
        load(write(b"PAR1", "rows.parquet"))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_text(write, load, name):
    rows = [GOOD] if name == "rows.json" else GOOD
    assert load(write(b"\xef\xbb\xbf" + json.dumps(rows).encode(), name)) == load(write([GOOD]))


@pytest.mark.parametrize(("truth", "text"), [(7, "7"), (-3, "-3"), (0.5, "0.5"), ("1/2", "1/2"), (0, "0")])
def test_a_number_may_be_the_ground_truth_in_both_schemas(truth, text):
    for row in ({**GOOD, "ground_truth": truth}, {**VERL_ROW, "reward_model": {"ground_truth": truth}}):
        assert parse_row(row, "row")[1] == text


def test_fields_that_may_be_left_out():
    _, _, source, extra = parse_row({"prompt": "a", "ground_truth": "b", "extra_info": None, "solution": "c"}, "row")
    assert (source, extra) == ("unknown", {"solution": "c"})


def test_ids_count_rows_over_files_and_a_limit_stops_early(write, load):
    a, b = (
        write([{**GOOD, "prompt": c} for c in "abc"], "a.json"),
        write([{**GOOD, "prompt": c} for c in "de"], "b.json"),
    )
    assert [(p.id, p.text) for p in load(a, b)] == list(enumerate("abcde"))
    assert [p.text for p in load(a, b, limit=4)] == ["a", "b", "c", "d"]
    assert [p.text for p in load(a, "not/read.json", limit=2)] == ["a", "b"]


# ---- what is wrong is named ----


@pytest.mark.parametrize(
    ("row", "field", "got"),
    [
        (5, "prompt", "got 5"),
        (None, "prompt", "got None"),
        (["a"], "prompt", "got ['a']"),
        ({"ground_truth": "1"}, "'prompt'", "got nothing"),
        ({"prompt": " \n", "ground_truth": "1"}, "'prompt'", r"got ' \n'"),
        ({"prompt": 3, "ground_truth": "1"}, "'prompt'", "got 3"),
        ({"prompt": [], "ground_truth": "1"}, "'prompt'", "got []"),
        (
            {"prompt": ["hi"], "ground_truth": "1"},
            "'prompt'",
            "message 1, must be a text, or a list of {role, content} messages, got 'hi'",
        ),
        (
            {"prompt": [{"role": "user"}], "ground_truth": "1"},
            "'prompt'",
            "message 1 has no 'content', got {'role': 'user'}.",
        ),
        ({"prompt": [{"content": "hi"}], "ground_truth": "1"}, "'prompt'", "has no 'role', got {'content': 'hi'}."),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"rol": "user", "content": "b"}], "ground_truth": "1"},
            "'prompt'",
            "message 2 has no 'role', got {'rol': 'user', 'content': 'b'}; is 'rol' meant for it?",
        ),
        (
            {"prompt": [{"role": "assistant", "contents": "a"}], "ground_truth": "1"},
            "'prompt'",
            "message 1 has no 'content', got {'role': 'assistant', 'contents': 'a'}; is 'contents' meant for it?",
        ),
        ({"prompt": [{"role": "user", "text": "a"}], "ground_truth": "1"}, "'prompt'", "has no 'content'"),
        ({"prompt": [{"role": "user", "content": 5}], "ground_truth": "1"}, "'prompt'", "got 5"),
        ({"prompt": "a"}, "'ground_truth'", "got nothing"),
        ({"prompt": "a", "ground_truth": None}, "'ground_truth'", "got None"),
        ({"prompt": "a", "ground_truth": float("nan")}, "'ground_truth'", "got nan"),
        ({"prompt": "a", "anwser": "1"}, "'ground_truth'", "got nothing. The row has 'prompt', 'anwser'"),
        ({"prompt": "a", "reward_model": "1"}, "'reward_model'", "got '1'"),
        ({"prompt": "a", "reward_model": {"style": "rule"}}, "'reward_model'", "got {'style': 'rule'}"),
        ({"prompt": "a", "ground_truth": "1", "data_source": 5}, "'data_source'", "got 5"),
        ({"prompt": "a", "ground_truth": "1", "extra_info": "x"}, "'extra_info'", "got 'x'"),
    ],
)
def test_a_malformed_row_names_file_row_and_field(write, load, row, field, got):
    path = write([GOOD, row])
    with pytest.raises(UserError) as e:
        load(path)
    assert str(e.value).startswith(f"{path}, row 2: ")
    assert field in str(e.value) and got in str(e.value)
    path = write(f"{json.dumps(GOOD)}\n\n{json.dumps(row)}", "rows.jsonl")
    with pytest.raises(UserError) as e:
        load(path)
    assert str(e.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ("", "rows.json", "rows.json is not valid JSON"),
        ('[{"prompt": "a"', "rows.json", "rows.json is not valid JSON"),
        (f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}", "rows.json", "name it .jsonl"),
        (json.dumps(GOOD), "rows.json", "rows.json holds a JSON dict; it must hold a list of rows"),
        (f"{json.dumps(GOOD)}\n{{", "rows.jsonl", "rows.jsonl, line 2 is not valid JSON"),
        ('[{"prompt": "größer"}]'.encode("latin-1"), "rows.json", "rows.json is not UTF-8 text (byte 15)"),
        ('{"prompt": "größer"}'.encode("latin-1"), "rows.jsonl", "rows.jsonl is not UTF-8 text"),
        ("[]", "rows.json", "no prompts in "),
        ("", "rows.jsonl", "no prompts in "),
    ],
)
def test_a_malformed_file_is_named(write, load, content, name, said):
    path = write(content, name)
    with pytest.raises(UserError) as e:
        load(path)
    assert said in str(e.value) and path in str(e.value)


def test_a_lone_surrogate_is_named_like_any_malformed_row(write, load):
    path = write('[{"prompt": "\\ud800", "ground_truth": "1"}]')
    with pytest.raises(UserError, match=r"rows\.json, row 1: "):
        load(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "no.json", tmp_path / "no.jsonl", tmp_path):
        with pytest.raises(UserError) as e:
            open_source(path)
        assert str(e.value).startswith(f"data file {path}: ")


# ---- length ----


def test_a_prompt_of_exactly_the_allowed_length_is_kept_and_one_token_more_is_an_error(write, load, tokenizer):
    path = write([GOOD, {**GOOD, "prompt": "x" * 30}])
    length = len(ids_of(tokenizer, f"<|user|>{'x' * 30}<|assistant|>"))
    assert len(load(path, max_prompt_length=length)) == 2
    with pytest.raises(UserError) as e:
        load(path, max_prompt_length=length - 1)
    assert f"{path}, row 2: the prompt has {length} tokens, data.max_prompt_length is {length - 1}" in str(e.value)
    assert "data.overlong=drop" in str(e.value)


def test_dropped_prompts_are_counted_and_leave_the_other_ids_alone(write, load, capsys):
    path = write([{**GOOD, "prompt": p} for p in ("a", "x" * 90, "b", "y" * 90)])
    assert [(p.id, p.text) for p in load(path, max_prompt_length=20, overlong="drop")] == [(0, "a"), (2, "b")]
    assert "dropped 2 prompts longer than 20 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="no prompts in .*4 dropped as too long"):
        load(path, max_prompt_length=2, overlong="drop")


def test_a_tokenizer_with_ids_outside_the_model_is_refused(write, load):
    with pytest.raises(UserError, match="row 1: .*ids outside the model's 10"):
        load(write([GOOD]), vocab_size=10)


# ---- prompts are made when asked for ----


def test_prompts_are_a_sequence_that_can_be_sent_to_another_process(write, tokenizer):
    files = [write(lines_of(*"ab"), "a.jsonl"), write([{**GOOD, "prompt": c} for c in ("c", "x" * 90, "d")])]
    prompts = load_prompts([*files, files[0]], tokenizer, max_prompt_length=20, overlong="drop")
    assert isinstance(prompts, Prompts) and len(prompts) == 6
    whole = list(prompts)
    assert [(p.id, p.text) for p in whole] == [(0, "a"), (1, "b"), (2, "c"), (4, "d"), (5, "a"), (6, "b")]
    assert [prompts[i] for i in (5, 0, -1, -6, 3)] == [whole[i] for i in (5, 0, 5, 0, 3)]
    assert list(prompts[1:4]) == whole[1:4] and list(prompts[::-2]) == whole[::-2] and len(prompts[6:]) == 0
    assert [prompts.place(i) for i in (1, 3, 4)] == [f"{files[0]}, line 2", f"{files[1]}, row 3", f"{files[0]}, line 1"]
    assert list(pickle.loads(pickle.dumps(prompts))) == whole
    with pytest.raises(IndexError):
        prompts[6]


def test_published_rows_train_as_they_are(write, load):
    gsm8k = {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
    path = write(f"{json.dumps(gsm8k)}\n{json.dumps({**gsm8k, 'answer': '#### four'})}", "rows.jsonl")
    prompt = load(path, limit=1)[0]
    assert (prompt.text, prompt.ground_truth, prompt.data_source) == ("2 + 2?", "4", "gsm8k")
    with pytest.raises(UserError, match="rows.jsonl, line 2: field 'answer' must end in a line like '#### 72'"):
        load(path)


def test_neither_rows_nor_prompts_are_kept(write, tokenizer):
    path = write(lines_of(*(f"{i} " * 50 for i in range(20_000))), "rows.jsonl")
    assert Path(path).stat().st_size > 5e6
    load_prompts([path], tokenizer, max_prompt_length=1000, limit=1)
    tracemalloc.start()
    prompts = load_prompts([path], tokenizer, max_prompt_length=1000)
    for i in range(0, len(prompts), 100):
        prompts[i]
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 30 * len(prompts) and peak < 60 * len(prompts) + 200_000


def test_short_prompts_are_not_tokenized_before_they_are_used(write, tokenizer, monkeypatch):
    texts = ["x" * 5, "y" * 5, "z" * 60, "解" * 20, "w" * 5]
    asked = []
    monkeypatch.setattr("gspo.data.encoding.encode", lambda m, *rest: asked.append(m[0]["content"]) or encode(m, *rest))
    prompts = load_prompts([write(lines_of(*texts), "rows.jsonl")], tokenizer, max_prompt_length=70)
    assert asked == [texts[0], "x", texts[2], texts[3]]  # the first of its roles, the template's probe, two in doubt
    assert [p.text for p in prompts] == texts


def test_a_prompt_that_became_too_long_after_the_check_is_named_when_used(write, tokenizer, monkeypatch):
    path = write([GOOD, {**GOOD, "prompt": "x" * 90}])
    monkeypatch.setattr(Encoder, "bound", lambda *_: 1)
    prompts = load_prompts([path], tokenizer, max_prompt_length=20)
    assert prompts[0].text == GOOD["prompt"]
    with pytest.raises(UserError, match=r"rows\.json, row 2: the prompt has \d+ tokens, data.max_prompt_length is 20"):
        prompts[1]


def test_only_prompts_that_may_be_the_longest_are_tokenized(write, tokenizer, monkeypatch):
    texts = ["a" * n for n in (3, 40, 80, 60, 79, 50, 3)]
    checker = RowChecker(Encoder(tokenizer), max_length=1000, positions=45)
    asked = []
    monkeypatch.setattr("gspo.data.encoding.encode", lambda m, *rest: asked.append(m[0]["content"]) or encode(m, *rest))
    for text in texts:
        checker({**GOOD, "prompt": text}, "here")
    assert checker.longest == len(ids_of(tokenizer, f"<|user|>{'a' * 80}<|assistant|>"))
    assert asked == [texts[0], "x", texts[1], texts[2], texts[4]]  # 60 and 50 cannot be the longest any more


# ---- the chat template ----


@pytest.mark.parametrize(
    ("messages", "system", "text"),
    [
        ([("user", "hi")], None, "<|user|>hi<|assistant|>"),
        ([("user", "hi")], "Be brief.", "<|system|>Be brief.<|user|>hi<|assistant|>"),
        ([("system", "Own."), ("user", "hi")], "Be brief.", "<|system|>Own.<|user|>hi<|assistant|>"),
        (
            [("user", "a"), ("assistant", "b"), ("user", "c")],
            "S",
            "<|system|>S<|user|>a<|assistant|>b<|end|><|user|>c<|assistant|>",
        ),
    ],
)
def test_encoding_is_the_chat_templates_text(tokenizer, messages, system, text):
    messages = [{"role": role, "content": content} for role, content in messages]
    ids = encode(messages, tokenizer, system, {})
    assert ids == ids_of(tokenizer, text) and tokenizer.decode(ids) == text
    assert ids.count(tokenizer.convert_tokens_to_ids("<|system|>")) == text.count("<|system|>")


def test_template_arguments_are_passed_on_and_without_a_template_the_text_is_encoded_alone(tokenizer):
    other, messages = copy.deepcopy(tokenizer), [{"role": "user", "content": "hi"}]
    other.chat_template = "{{ messages[0]['content'] }}{% if enable_thinking %}...{% endif %}"
    assert other.decode(encode(messages, other, None, {"enable_thinking": True})) == "hi..."
    other.chat_template = None
    assert other.decode(encode(messages, other, "Be brief.", {})) == "Be brief.\nhi"


def test_a_template_that_refuses_the_messages_names_the_row(write, tokenizer):
    other = copy.deepcopy(tokenizer)  # as Gemma's does
    other.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"row 1: .*System role not supported"):
        load_prompts([write([VERL_ROW])], other, max_prompt_length=100)

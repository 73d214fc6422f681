"""Rows as they come in real life: tool calls, content parts, odd ground truths, half characters, missing solutions."""

import copy
import datetime
import json
import re
from decimal import Decimal

import pytest
from row_files import GOOD

from gspo.data.encoding import Encoder, check_template_kwargs, encode
from gspo.data.messages import read_messages, read_tools
from gspo.data.prompts import load_splits
from gspo.data.row_checker import prompt_key
from gspo.data.schemas import parse_row
from gspo.data.sources import open_source
from gspo.errors import UserError
from gspo.models.loading import load_model_config
from gspo.read_config import load_config

TEMPLATE = """{% if tools %}TOOLS {{ tools | tojson }}
{% endif %}{% for m in messages %}<{{ m.role }}>{% if m.name is defined %}({{ m.name }}){% endif %}{% if m.content %}\
{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}CALL {{ c.function | tojson }}{% endfor %}</>
{% endfor %}{% if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>{% endif %}{% endif %}"""
CALL = {"type": "function", "id": None, "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "strict": None}}
ASKED = {"role": "user", "content": "1 + 2?"}


@pytest.fixture()
def chat(tokenizer):
    """A tokenizer with a chat template that reads tools, names and tool calls."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATE
    return other


@pytest.fixture()
def splits(tmp_path, monkeypatch, tokenizer, write):
    """Survey rows as training does -> the prompts."""
    monkeypatch.chdir(tmp_path)

    def splits(rows, *overrides, tokenizer=tokenizer, name="rows.jsonl", **options):
        text = "".join(json.dumps(row) + "\n" for row in rows) if name.endswith("l") else json.dumps(rows)
        cfg = load_config(None, [f"data.train_files={write(text, name)}", *overrides])
        return load_splits(cfg, tokenizer, load_model_config(None), **options).train

    return splits


def shown(chat, prompt, tools=None, **kwargs):
    ids = encode(read_messages(prompt, "here"), chat, None, kwargs, read_tools(tools, "here"))
    return chat.decode(ids)


# ---- messages reach the template whole ----


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([ASKED], "<user>1 + 2?</>\n<assistant>"),
        ([{**ASKED, "name": "Ann"}], "<user>(Ann)1 + 2?</>\n<assistant>"),
        ([{**ASKED, "name": None, "tool_calls": None}], "<user>1 + 2?</>\n<assistant>"),
        (
            [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}],
            '<user>1 + 2?</>\n<assistant>CALL {"name": "add", "arguments": {"a": 1}}</>\n<tool>3</>\n<assistant>',
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "2?"}]}],
         "<user>1 + 2?</>\n<assistant>"),
        ([{"role": "user", "content": ["a", {"text": "b", "type": None}]}], "<user>ab</>\n<assistant>"),
        ([{"role": "user", "content": {"type": "input_text", "text": "one part"}}], "<user>one part</>\n<assistant>"),
        # continued, not closed
        ([ASKED, {"role": "assistant", "content": "It is"}], "<user>1 + 2?</>\n<assistant>It is"),
        ([ASKED, {"role": "assistant", "content": ""}], "<user>1 + 2?</>\n<assistant>"),
        ([ASKED, {"role": "assistant", "content": [{"type": "text", "text": "<think>\n"}]}],
         "<user>1 + 2?</>\n<assistant><think>\n"),
    ],
)  # fmt: skip
def test_the_template_sees_every_field_and_no_null(chat, messages, text):
    assert shown(chat, messages) == text
    ids = Encoder(chat).ids(read_messages(messages, "here"), "here")
    assert chat.decode(ids) == text
    bound = Encoder(chat).bound(read_messages(messages, "here"), "here")
    assert bound is None or bound >= len(ids)


@pytest.mark.parametrize("given", [[TOOL], json.dumps([TOOL])], ids=["list", "text"])
def test_tools_reach_the_template(chat, given):
    text = shown(chat, [ASKED], given)
    assert text.startswith('TOOLS [{"type": "function", "function": {"name": "add", "description": "adds"}}]\n<user>')


@pytest.mark.parametrize("given", [None, [], "", " ", "[]"])
def test_a_row_may_have_no_tools(chat, given):
    assert shown(chat, [ASKED], given) == "<user>1 + 2?</>\n<assistant>"


@pytest.mark.parametrize("given", ["add", {"name": "add"}, ["add"], "[1]", 5])
def test_tools_that_are_none_are_refused(given):
    with pytest.raises(UserError, match="x, row 3: field 'tools' must be a list of objects"):
        read_tools(given, "x, row 3")


def test_tools_and_calls_of_rows_come_through_training(splits, chat):
    row = {"prompt": [{"role": "system", "content": "s"}, ASKED], "ground_truth": "3", "tools": [TOOL]}
    (prompt,) = splits([row], tokenizer=chat)
    assert chat.decode(prompt.ids).startswith('TOOLS [{"type"') and prompt.text == "1 + 2?"
    plain, other = read_messages([ASKED], "here"), read_messages([{**ASKED, "name": "Ann"}], "here")
    assert len({prompt_key(plain), prompt_key(plain, [TOOL]), prompt_key(other)}) == 3


@pytest.mark.parametrize(
    ("prompt", "more", "said"),
    [
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "message 1: a content part of type 'image_url'"),
        ([ASKED, {"role": "tool", "content": [{"type": "audio"}]}], {}, "message 2: a content part of type 'audio'"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], {}, "part of type 'text' is not text"),
        ("What is on <image>?", {"images": [{"bytes": "x"}]}, "field 'images' is not empty"),
        ([{**ASKED, "images": ["x"]}], {}, "message 1: field 'images' is not empty"),
        ("Watch", {"videos": ["a.mp4"]}, "field 'videos' is not empty"),
        ([ASKED, {"role": "assistant", "content": None}], {}, "message 2 has no 'content'"),
        ([ASKED, {"role": "assistant", "tool_calls": [CALL]}], {}, "ends in a message of the assistant without"),
    ],
)
def test_what_the_model_cannot_be_shown_is_refused_by_name(splits, chat, prompt, more, said):
    with pytest.raises(UserError) as e:
        splits([GOOD, {"prompt": prompt, "ground_truth": "3", **more}], tokenizer=chat)
    assert "rows.jsonl, line 2: " in str(e.value) and said in str(e.value)


def test_empty_columns_of_images_are_no_images(splits):
    assert len(splits([{**GOOD, "images": [], "videos": None, "image": ""}])) == 1


def test_a_field_that_the_template_never_reads_is_told_once(splits, chat, capsys):
    row = {"ground_truth": "3", "prompt": [{**ASKED, "weight": 1, "name": "Ann"}]}
    splits([row, row, {**row, "prompt": [{**ASKED, "weight": 2, "thinking": "hm"}]}], tokenizer=chat)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("warning: ") and "line 1: the chat template never reads 'weight'" in first
    assert "line 3: the chat template never reads 'thinking'" in second
    chat.chat_template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    chat.chat_template = chat.chat_template.replace("m |", "message |").replace("for m", "for message")
    splits([row], tokenizer=chat)
    assert capsys.readouterr().out == "", "it writes whatever a message has"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": [{**ASKED, "tool_calls": [CALL]}]}, "'tool_calls'"),
        ({"prompt": "1?", "tools": [TOOL]}, "'tools'"),
        ({"prompt": [{**ASKED, "name": "Ann"}]}, "'name'"),
    ],
)
def test_without_a_template_a_field_that_would_be_lost_is_refused(splits, tokenizer, row, said):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match=f"line 1: the prompt has {said}, but this tokenizer has no chat template"):
        splits([{"ground_truth": "3", **row}], tokenizer=bare)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"enable_thinking": True}, ""),
        ({"enable_thinkng": True}, "never reads 'enable_thinkng', so it has no effect. Do you mean 'enable_thinking'?"),
        ({"thinking_budget": 5}, "never reads 'thinking_budget'"),
        ({"max_length": 5}, "never reads 'max_length'"),
        ({"chat_template": "{{ messages[0].content }}", "enable_thinking": True}, "never reads 'enable_thinking'"),
        ({"tools": [TOOL]}, ""),
    ],
)
def test_a_template_argument_without_effect_is_told(chat, capsys, kwargs, said):
    check_template_kwargs(chat, kwargs)
    out = capsys.readouterr().out
    assert said in out and bool(out) == bool(said)


@pytest.mark.parametrize("key", ["add_generation_prompt", "continue_final_message", "tokenize"])
def test_a_template_argument_that_follows_from_the_prompt_is_refused(splits, key):
    with pytest.raises(UserError, match=f"data.chat_template_kwargs: '{key}' follows from each prompt"):
        splits([GOOD], f"data.chat_template_kwargs.{key}=true")


# ---- tables ----


def test_maps_in_parquet_are_objects(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    text = pa.map_(pa.string(), pa.string())
    columns = {
        "prompt": pa.array([[[("role", "user"), ("content", "1 + 2?")]]], pa.list_(text)),
        "ground_truth": pa.array(["3"]),
        "extra_info": pa.array([[("split", "train")]], text),
    }
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    source = open_source(tmp_path / "rows.parquet")
    assert parse_row(source[0], "here") == ([ASKED], "3", "unknown", {"split": "train"}) and [*source.rows()] == [
        source[0]
    ]
    twice = pa.table({"extra_info": pa.array([[("k", "a"), ("k", "b")]], text)})
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice.parquet, row 1 cannot be read"):
        open_source(tmp_path / "twice.parquet")[0]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_row_has_no_field_twice(write, splits, name):
    row = '{"prompt": "a", "ground_truth": "1", "prompt": "b"}'
    path = write(f"[{row}]" if name == "rows.json" else row, name)
    with pytest.raises(UserError, match="key 'prompt' is given twice"):
        [*open_source(path).rows()] and open_source(path)[0]


# ---- ground truths ----

DAY = datetime.date(2026, 11, 29)


@pytest.mark.parametrize(
    ("value", "given"),
    [
        (72.0, "72"), (-3.0, "-3"), (-0.0, "0"), (0.5, "0.5"), (1e15, "1000000000000000"), (1e300, "1e+300"),
        (2**70, str(2**70)), (Decimal("72.00"), "72"), (Decimal("72.50"), "72.50"), ("72.0", "72.0"),
        (True, True), (False, False), (["7", "seven"], ["7", "seven"]), ([72.0], [72.0]),
        ({"target": ["a"], "n": None}, {"target": ["a"], "n": None}), ([], []), (DAY, DAY),
    ],
)  # fmt: skip
def test_numbers_are_text_and_other_ground_truths_as_they_are(value, given):
    for row in ({**GOOD, "ground_truth": value}, {"prompt": "x", "reward_model": {"ground_truth": value}}):
        truth = parse_row(row, "here")[1]
        assert truth == given and type(truth) is type(given)


def test_a_column_with_a_hole_gives_whole_numbers(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"prompt": ["a", "b"], "ground_truth": [72.0, None]}), tmp_path / "r.parquet")
    source = open_source(tmp_path / "r.parquet")
    assert parse_row(source[0], "here")[1] == "72"
    with pytest.raises(UserError, match="field 'ground_truth' must be .* got None"):
        parse_row(source[1], "here")


@pytest.mark.parametrize("value", [["7"], {"target": "7"}, True, []], ids=str)
def test_the_default_reward_refuses_them_in_words(splits, tmp_path, value):
    from gspo.reward.reward_func import compute_score

    rows = [GOOD, {**GOOD, "ground_truth": value}]
    with pytest.raises(
        UserError, match=r"line 2: field 'ground_truth' is a \w+ .*compares texts and numbers.*reward.path"
    ):
        splits(rows)
    (tmp_path / "mine.py").write_text("")
    assert splits(rows, f"reward.path={tmp_path}/mine.py")[1].ground_truth == value
    with pytest.raises(TypeError, match="compares texts and numbers"):
        compute_score("", "7", value)


@pytest.mark.parametrize("value", ["", " ", "\n\t", "\u3000"])
def test_an_empty_ground_truth_is_for_a_function_of_ones_own(splits, tmp_path, value):
    rows = [GOOD, {**GOOD, "ground_truth": value}]
    with pytest.raises(UserError, match="line 2: field 'ground_truth' is empty .* no response right.*reward.path"):
        splits(rows)
    (tmp_path / "mine.py").write_text("")
    assert splits(rows, f"reward.path={tmp_path}/mine.py")[1].ground_truth == value


# ---- half characters ----

HALF = "7\ud83d"


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"ground_truth": HALF}, "ground_truth"),
        ({"data_source": HALF}, "data_source"),
        ({"prompt": HALF}, "prompt"),
        ({"prompt": [ASKED, {"role": "user", "content": [{"type": "text", "text": HALF}]}]}, "prompt"),
        ({"extra_info": {"notes": ["ok", {"deep": HALF}]}}, "extra_info"),
        ({"extra_info": {HALF: 1}}, "extra_info"),
        ({"solution": "\udcff"}, "solution"),
        ({"not read": HALF}, "not read"),
        ({HALF: 1}, "7\\ud83d"),
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_half_a_character_is_found_before_training(splits, row, field, name):
    with pytest.raises(UserError) as e:
        splits([GOOD, {**GOOD, **row}], name=name)
    place = "rows.jsonl, line 2" if name == "rows.jsonl" else "rows.json, row 2"
    assert f"{place}: field '{field}' holds half a character ('\\ud" in str(e.value)


@pytest.mark.parametrize("text", ["😀", "\\ud83d", "解", "e\u0301", "\u0000"])
def test_whole_characters_are_fine(splits, text):
    assert len(splits([{**GOOD, "ground_truth": text, "extra_info": {text: text}}])) == 1


# ---- gold solutions ----


@pytest.mark.parametrize("row", [{}, {"solution": None}, {"solution": " "}, {"solution": ["a"]}, {"extra_info": {}}])
def test_a_missing_solution_is_found_before_training(splits, row):
    with pytest.raises(UserError, match=r"line 2: objective.algorithm learns from gold texts, but .* 'solution'"):
        splits([{**GOOD, "solution": "s"}, {**GOOD, **row}], needs_solutions=True)
    assert len(splits([{**GOOD, **row}])) == 1


def test_a_solution_may_be_anywhere_it_is_read_from(splits):
    rows = [{**GOOD, "solution": "s"}, {**GOOD, "extra_info": {"solution": "s"}}, {"question": "q", "answer": "#### 7"}]
    assert len(splits(rows, needs_solutions=True)) == 3


# ---- nested hundreds deep, which JSON's reader takes and a function that calls itself does not ----


def nested(leaf, depth=700):
    for _ in range(depth):
        leaf = [leaf]
    return leaf


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("extra_info", {"a": nested("\ud83d")}),
        ("tools", [{"a": nested(1)}]),
        ("tools", "[" * 100_000),
        ("prompt", [{"role": "user", "content": "x", "a": nested(1)}]),
    ],
)
def test_a_field_nested_too_deep_is_refused(splits, field, value):
    with pytest.raises(UserError, match=f"rows.jsonl, line 1: field '{field}' (is nested too deep|must be a list)"):
        splits([{**GOOD, field: value}])


# ---- fields that nothing reads ----


def test_fields_that_nothing_reads_are_said_in_one_line_with_what_a_misspelt_one_is_meant_for(splits, capsys):
    splits([GOOD, {**GOOD, "extra_inf": {"a": 1}, "ability": "math"}, {**GOOD, "reward_kwarg": 1, "ability": "art"}])
    said = capsys.readouterr().out
    assert said.count("nothing reads") == 1
    assert "warning: of the rows nothing reads 'ability', 'extra_inf' (is 'extra_info' meant?), 'reward_kwarg'" in said


def test_of_fields_that_are_read_or_empty_nothing_is_said(splits, capsys):
    splits([{**GOOD, "extra_info": {"id": 1}, "solution": "2", "ability": None}])
    assert "nothing reads" not in capsys.readouterr().out


# ---- messages that the template leaves out ----

USERS_ONLY = "{% for m in messages if m.role == 'user' %}<user>{{ m.content | trim }}{% endfor %}<assistant>"


@pytest.mark.parametrize(
    ("template", "roles", "overrides", "said"),
    [
        (USERS_ONLY, ["system", "user"], [], "line 2: the chat template leaves out messages of the role 'system',"),
        (USERS_ONLY, ["user", "tool", "function"], [], "messages of the role 'function', 'tool',"),
        (USERS_ONLY, ["user"], ["data.system_prompt=Be brief."], "line 1: the chat template leaves out messages of"),
        (USERS_ONLY, ["user", "user"], [], ""),
        (TEMPLATE, ["system", "developer", "user", "Human"], [], ""),
    ],
)
def test_messages_that_the_template_leaves_out_are_told_once(splits, chat, capsys, template, roles, overrides, said):
    chat.chat_template = template
    row = {**GOOD, "prompt": [{"role": role, "content": " x"} for role in roles]}
    splits([GOOD, row, row], *overrides, tokenizer=chat)
    out = capsys.readouterr().out
    assert said in out and out.count("leaves out messages") == bool(said)


@pytest.mark.parametrize(("template", "role"), [(USERS_ONLY, "Human"), (USERS_ONLY, "USER"), ("Hello.", "user")])
def test_a_prompt_of_which_the_template_shows_nothing_is_refused(splits, chat, template, role):
    chat.chat_template = template
    with pytest.raises(UserError, match=f"line 1: the chat template shows nothing of this prompt, whose .* '{role}'"):
        splits([{**GOOD, "prompt": [{"role": role, "content": "x?"}]}], tokenizer=chat)


TALK = json.dumps([{"role": "system", "content": "Be brief."}, ASKED])


def test_a_text_of_json_is_read_as_messages_and_that_is_said_with_the_way_to_keep_it(splits, capsys):
    texts = [TALK, " " + TALK, "[1, 2] sorted?", '{"a": 1}', "[x", ASKED["content"]]
    found = splits([{"prompt": text, "ground_truth": "1"} for text in texts])
    said = capsys.readouterr().out
    assert found[0].ids == found[1].ids and [p.text for p in found] == [ASKED["content"]] * 2 + texts[2:]
    assert re.search(r"prompts of 2 rows are JSON texts, read as the messages in them .*rows.jsonl, line 1.", said)
    assert """write it as [{"role": "user", "content": TEXT}].""" in said
    capsys.readouterr()
    kept = splits([{"question": TALK, "answer": "1"}, {"prompt": [{"role": "user", "content": TALK}], "answer": "1"}])
    assert "the prompts of 1 rows are JSON texts" in capsys.readouterr().out and kept[1].text == TALK
    with pytest.raises(UserError, match="message 1 has no 'role', .* JSON text of messages. To give such a text as it"):
        splits([{"prompt": '[{"x": 1}]', "ground_truth": "1"}])
    with pytest.raises(UserError, match="message 1 has no 'role'") as e:
        splits([{"prompt": [{"x": 1}], "ground_truth": "1"}])
    assert "JSON" not in str(e.value)

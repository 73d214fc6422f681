"""Messages in Chinese: every message has an entry, an entry matches its own message, and what varies is kept."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
from repository import ROOT

from gspo import compare
from gspo.check_data import TITLES
from gspo.memory.footprint import CHANGE
from gspo.metrics.progress import COLUMNS
from gspo.system import language
from gspo.system.language import CATALOGUE, ERROR, PLACE, WORD, fill, to_chinese, translated

ENTRIES = json.loads(CATALOGUE.read_text(encoding="utf-8"))
PROGRAMS = [*sorted((ROOT / "gspo").rglob("*.py")), ROOT / "train.py", ROOT / "eval.py"]
SAYING = {"UserError", "say", "wrong_folder", "end_at_once"}  # functions whose texts a user reads
FORMATTED = re.compile(r"\{(limit|value)(:[^}]*)?\}")  # what str.format puts in
CONSTANT, SENTENCE = re.compile(r"[A-Z][A-Z_]+"), re.compile(r"(\w+ ){3}\w+")


def template(node):
    """The text of a string expression, with {} for what varies; None where it is no string."""
    if isinstance(node, ast.Constant):
        return FORMATTED.sub("{}", node.value) if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [template(node.left), template(node.right)]
        return None if parts == [None, None] else "".join("{}" if part is None else part for part in parts)
    return None


def messages(source):
    """All texts of a module that its user reads: errors, lines, alarms, help of flags, the page of a program, and
    sentences that have a name."""
    tree, wanted = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            wanted += node.args if name in SAYING else []
            wanted += [keyword.value for keyword in node.keywords if name == "add_argument" and keyword.arg == "help"]
            wanted += node.args[5:7] if name == "Guard" else []
            if name == "ArgumentParser":
                yield ast.get_docstring(tree)
        elif isinstance(node, ast.Assign) and CONSTANT.fullmatch(getattr(node.targets[0], "id", "")):
            text = template(node.value)
            wanted += [node.value] if text and SENTENCE.search(text) else []
    for text in map(template, wanted):
        if text and re.search(r"[a-z]{3}", text.replace("{}", "")):
            yield text


ALL = sorted(
    {
        text.strip()
        for file in PROGRAMS
        if "embedded" not in file.parts
        for text in messages(file.read_text(encoding="utf-8"))
        if text
    }
)


def test_every_message_has_an_entry():
    missing = [text for text in ALL if text not in ENTRIES]
    assert not missing, f"{len(missing)} messages are not in {CATALOGUE.name}: {json.dumps(missing[:10])}"


def test_every_word_of_a_table_or_a_line_of_figures_has_an_entry():
    """Those that are written where they are used, and the names of columns, parts and figures."""
    calls = re.findall(r"\bword\(([^()]*)\)", "".join(file.read_text(encoding="utf-8") for file in PROGRAMS))
    words = {text for call in calls for text in re.findall(r'["\']([^"\']+)["\']', call)}
    words |= {*COLUMNS, *TITLES, *compare.HELD_OUT.values(), *CHANGE, "before training", "after training"}
    assert len(words) > 40 and [text for text in sorted(words) if text and WORD + text not in ENTRIES] == []


def test_an_entry_keeps_what_varies():
    wrong = []
    for english, chinese in ENTRIES.items():
        count, places = english.count("{}"), PLACE.findall(chinese)
        if places != [""] * count and sorted(places) != [str(i + 1) for i in range(count)]:
            wrong.append(english)
    assert not wrong


def test_an_entry_is_found_by_its_own_message():
    wrong = []
    for english, chinese in ENTRIES.items():
        parts = [f"X{i}Y" for i in range(english.count("{}"))]
        if "{}{}" in english:  # a word, and what may follow it
            parts = [f"{' ' * (i > 0)}{part}" for i, part in enumerate(parts)]
        if english != ERROR and to_chinese(fill(english, parts)) != fill(chinese, parts).strip():
            wrong.append(english)
    assert not wrong


@pytest.mark.parametrize("place", ["model.path", "MODEL", "--compare", "CHECKPOINT"])
def test_a_model_has_one_message_by_whatever_place_it_is_named(place):
    said = to_chinese(
        f"error: {place} = 'm' is no folder here, and a name on the hub is OWNER/NAME. Give a Hugging Face folder or "
        "such a name, or leave it empty. Is n meant?"
    )
    assert said.startswith(f"错误：{place} = 'm' 在这里不是文件夹") and said.endswith("是指 n 吗？")


def test_a_message_inside_a_message_is_translated_and_names_are_left(monkeypatch):
    found = {
        "error: ": "错误：",
        "{} is wrong: {}. {}": "{1} 错了：{2}。{3}",
        "too long": "太长",
        "Cut it.": "请截短。",
    }
    monkeypatch.setattr(language, "CATALOGUE", type("File", (), {"read_text": lambda self, **_: json.dumps(found)})())
    language._catalogue.cache_clear()
    assert to_chinese("a.json is wrong: too long. Cut it.") == "a.json 错了：太长。请截短。"
    assert to_chinese("\n  b is wrong: no entry. Cut it.\n") == "\n  b 错了：no entry。请截短。\n"
    assert to_chinese("nothing of the kind") == "nothing of the kind"
    assert to_chinese("too long\nCut it.") == "太长\n请截短。" and to_chinese("too long | x") == "太长 | x"
    assert to_chinese("error: c is wrong: too long. x") == "错误：c 错了：太长。x"
    language._catalogue.cache_clear()


@pytest.mark.parametrize(
    ("environment", "chosen"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "en_US.UTF-8", "GSPO_LANG": "zh"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "GSPO_LANG": "en"}, "en"),
        ({}, "en"),
    ],
)
def test_the_environment_chooses(monkeypatch, environment, chosen):
    for name in ("GSPO_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert language.language() == chosen
    assert (translated("error: {}".format("x")) == "error: x") == (chosen == "en")


def test_a_program_speaks_chinese():
    run = lambda *args: subprocess.run(  # noqa: E731
        [sys.executable, "train.py", *args], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "GSPO_LANG": "zh", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    wrong = run("--config", "quick", "optim.learning_rat=1")
    assert wrong.returncode == 2 and wrong.stderr.startswith("错误：") and "optim.learning_rate" in wrong.stderr
    helped = run("--help")
    assert helped.returncode == 0 and "用法" in helped.stdout and "show this help" not in helped.stdout


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        (
            "warning, step 4: 75% of the responses are cut off: raise the limit.",
            "警告，第 4 步：75% 的回复被截断：raise",
        ),
        ("step 4: held-out accuracy 0.3 (was 0.1), reward 0.4", "第 4 步：留出准确率 0.3（之前 0.1）"),
        (
            "note, command line: bf16 needs no setting: every step is logged.",
            "提示，命令行：bf16 不需要设置：每一步都有记录。",
        ),
        (
            "error: out holds a run with a.b = 1, but this command has 2. Keep them; or go on in this folder with "
            "other step sizes and coefficients: trainer.resume=force; or x.",
            "错误：out 中的训练是 a.b = 1，而这条命令是 2。保持这些设置；或在这个目录里用别的步长和系数继续",
        ),
        ("the whole run takes about 9 s: 3 more steps of 0.8 s and 2 s of evaluation", "每步 0.8 秒，另加评估 2 秒"),
    ],
)
def test_a_message_made_of_parts_is_chinese_in_all_of_them(english, chinese):
    assert chinese in to_chinese(english)

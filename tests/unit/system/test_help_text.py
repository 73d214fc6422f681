"""`--help` in the cells of a terminal, in English and in Chinese."""

import argparse

import pytest

from gspo.command_line import parse_arguments
from gspo.system import language
from gspo.system.cells import width
from gspo.system.help_text import HelpText

DESCRIPTION = """Draw it.

    python draw.py outputs/quick picture.png   # which is a command with a comment

The first line of a paragraph
and its second. {}
"""


@pytest.fixture()
def chinese(monkeypatch):
    monkeypatch.setenv("GSPO_LANG", "zh")
    monkeypatch.setattr(argparse.ArgumentParser, "format_help", argparse.ArgumentParser.format_help)
    monkeypatch.setattr(argparse, "_", argparse._)
    language.translate_help()


def parser_of(text, flag):
    parser = argparse.ArgumentParser(
        prog="python -m draw", description=DESCRIPTION.format(text), formatter_class=HelpText
    )
    parser.add_argument("--flag", metavar="FILE", help=flag)
    for name in ("one", "other", "third", "fourth"):
        parser.add_argument(f"--{name}_of_them", type=int)
    return parser


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_no_line_is_wider_than_the_terminal(monkeypatch, chinese, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = "打印贪心准确率、无偏的 pass@k、maj@k 和平均奖励，附区间；有几个数据来源时按来源分列。" * 3
    shown = parser_of(text, text).format_help()
    assert max(map(width, shown.splitlines())) <= columns
    assert "".join(shown.split()).count("".join(text.split())) == 2, "no character is lost, in either place"
    assert "The first line of a paragraph and its" in shown.replace("\n", " ")


def test_a_usage_of_several_lines_is_aligned_in_chinese(monkeypatch, chinese):
    monkeypatch.setenv("COLUMNS", "60")
    first, second, *_ = parser_of("", "").format_usage().splitlines()
    assert first.startswith("用法： python -m draw [-h]")
    assert width(second) - len(second.lstrip()) == width("用法： python -m draw ")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_usage_of_a_program_with_settings_is_whole(monkeypatch, request, capsys, lang):
    if lang == "zh":
        request.getfixturevalue("chinese")
    parser = parser_of("", "")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    with pytest.raises(SystemExit):
        parse_arguments(parser, ["--help"])
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("用法： python -m draw [-h]" if lang == "zh" else "usage: python -m draw [-h]")


def test_commands_keep_their_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("GSPO_LANG", "en")
    lines = parser_of("", "").format_help().splitlines()
    assert "    python draw.py outputs/quick picture.png   # which is" in lines
    assert lines[lines.index("    python draw.py outputs/quick picture.png   # which is") + 1].startswith("        a ")

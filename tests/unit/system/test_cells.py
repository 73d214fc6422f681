"""Text in the cells of a terminal: widths counted by hand, columns that begin in the same cell, lines that fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo.system.cells import columns, flush_left, flush_right, fold, width


@pytest.mark.parametrize(
    ("text", "cells"),
    [("", 0), ("step", 4), ("奖励", 4), ("kl 散度：", 9), ("（a）", 5), ("é", 1), ("e\u0301", 1), ("…", 1)],
)
def test_a_chinese_character_takes_two_cells(text, cells):
    assert width(text) == cells


def test_columns_begin_in_the_same_cell():
    assert columns([["", "训练前", "after"], ["准确率", "0.5", "1"], ["pass@1", "0.25", "x"]]) == (
        "        训练前  after\n准确率  0.5     1\npass@1  0.25    x"
    )
    assert (
        flush_left("步", 4) + "|" == "步  |" and flush_right("步", 4) == "  步" and flush_right("longer", 4) == "longer"
    )


def test_lines_are_broken_between_words_and_at_chinese_characters():
    assert fold("one two three four", 9) == "one two\nthree\nfour"
    assert fold("one two three", 9, "    ") == "one two\n    three"
    assert fold("第一轮结束，准确率 0.961", 11) == "第一轮结\n束，准确率\n0.961", "no line begins with a comma"
    assert fold("至多（含）三步", 6) == "至多\n（含）\n三步"
    assert fold("outputs/quick/checkpoints is", 8) == "outputs/quick/checkpoints\nis", "a path stays whole"
    assert fold("fits\n  as it  stands", 20) == "fits\n  as it  stands"


@given(st.text(alphabet="ab 中，。（）0", max_size=60), st.integers(4, 30))
def test_folding_loses_no_character_and_no_line_is_too_wide(text, cells):
    folded = fold(text, cells)
    assert folded.replace("\n", "").replace(" ", "") == text.replace(" ", "")
    for line in folded.split("\n"):
        assert width(line) <= cells or not set(line.strip()) & {" "}

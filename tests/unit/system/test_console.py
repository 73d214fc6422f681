"""Progress lines: none for short work, some for long work, none from other ranks."""

import io
import re

import pytest
from screen import Screen
from tqdm import tqdm

import gspo.system.console as progress
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import Sampler
from gspo.system.cells import width
from gspo.system.output import KeptStream
from gspo.types import Prompt


def test_every_item_passes_in_order(monkeypatch):
    assert list(progress.track([3, 1, 2], "x")) == [3, 1, 2]
    monkeypatch.setenv("RANK", "1")
    assert list(progress.track(iter([3, 1, 2]), "x")) == [3, 1, 2]


def test_short_work_prints_nothing_and_long_work_prints_lines(monkeypatch, capsys):
    list(progress.track(range(50), "short"))
    assert capsys.readouterr().out == ""
    clock = iter(range(0, 10_000, 6))  # six seconds an item
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    list(progress.track(range(9), "long"))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["long: 2 / 9, 18 s", "long: 5 / 9, 36 s", "long: 8 / 9, 54 s"]


def test_other_ranks_are_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    progress.say("not me")
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    progress.say("me")
    assert capsys.readouterr().out == "me\n"


# ---- while sampling ----


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_long_sampling_prints_responses_done_and_tokens_per_second(monkeypatch, capsys):
    """Six seconds a step: a line at 18 and 36 s, by when 2 and 5 of 8 responses, 180 and 540 tokens are there."""
    clock, seen = iter(range(0, 10_000, 6)), []
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    progress_of = iter([(2, 180), (5, 540)])
    with progress.track_sampling("sampling", 8, lambda: seen.append(1) or next(progress_of)) as tick:
        for _ in range(7):
            tick()
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["sampling: 2 / 8 responses, 10 tok/s, 18 s", "sampling: 5 / 8 responses, 15 tok/s, 36 s"]
    assert len(seen) == 2, "tokens are counted only for a line"


def test_a_phase_has_its_name_and_says_soon_how_long_it_takes(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 5))  # five seconds a step: the first line after one, the next three later
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    progress_of = iter([(0, 90), (4, 540)])
    with (
        progress.phase("before training"),
        progress.track_sampling("sampling", 8, lambda: next(progress_of)) as tick,
    ):
        for _ in range(5):
            tick()
    assert capsys.readouterr().out.splitlines() == [
        "before training: 0 / 8 responses, 18 tok/s, 5 s",
        "before training: 4 / 8 responses, 22 tok/s, 25 s, about 25 s left",
    ]
    with progress.track_sampling("sampling", 8, lambda: (1, 10)) as tick:
        for _ in range(5):
            tick()
    assert capsys.readouterr().out == "sampling: 1 / 8 responses, 0 tok/s, 20 s\n", "what has no name is a step's"


def test_the_time_left_is_not_told_by_the_first_few_responses(monkeypatch, capsys):
    """1,152 responses are generated at the same time: after 36 s 5 short ones are there, but no 2 hours are left."""
    clock = iter(range(0, 10_000, 18))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    progress_of = iter([(5, 400), (143, 2_000), (144, 3_000)])
    with progress.phase("before training"), progress.track_sampling("x", 1_152, lambda: next(progress_of)) as tick:
        for _ in range(3):
            tick()
    said = [line.partition(" s, ")[2] for line in capsys.readouterr().out.splitlines()]
    assert said == ["", "", "about 6 min left"]


def test_times_that_have_passed():
    assert [progress.duration(s) for s in (3.4, 59.7, 329.2, 3600, 11_100)] == [
        *("3 s", "1 min 00 s", "5 min 29 s", "1 h 00 min", "3 h 05 min")
    ]


@pytest.mark.parametrize("environment", [{"RANK": "3", "WORLD_SIZE": "4"}, {}], ids=["other rank", "short"])
def test_other_ranks_and_short_sampling_are_silent(monkeypatch, capsys, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with progress.track_sampling("sampling", 8, lambda: pytest.fail("nothing is to be shown")) as tick:
        for _ in range(50):
            tick()
    assert capsys.readouterr().out == ""


def _in_ascii(line, **options):
    tqdm.__init__(line, **options, ascii=True)


def test_a_terminal_shows_one_line_that_is_removed_at_the_end(monkeypatch, embedded_model, tokenizer):
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stdout", terminal)
    monkeypatch.setattr(progress, "DELAY_S", 1e-9)
    monkeypatch.setattr(progress, "SHOW_EVERY_S", 0.0)
    monkeypatch.setattr(progress, "Line", type("Ascii", (progress.Line,), {"__init__": _in_ascii}))
    prompts = [Prompt(i, tuple(tokenizer(t)["input_ids"]), t, "", "") for i, t in enumerate(("1 + 1 =", "2 - 3 ="))]
    sampler = Sampler(embedded_model, tokenizer, embedded_model.device, max_slots=2)
    rollout = sampler.generate(prompts, 4, Sampling(1.0, max_new_tokens=10))
    frames = [frame for frame in terminal.getvalue().split("\r") if "responses" in frame]
    done = [int(re.search(r"(\d+)/8 responses, [\d,]+ tok/s", frame)[1]) for frame in frames]
    assert len(frames) >= int((rollout.lengths - 1).sum()) // 2 and done == sorted(done) and done[-1] == 8
    assert "\n" not in terminal.getvalue() and terminal.getvalue().split("\r")[-2].strip() == ""


# ---- a bar below the row of a table ----


def a_screen(monkeypatch, columns=60):
    """Return a terminal behind the stream of our programs, which shows control characters instead of passing them on;
    a fixture would be undone before the test."""
    shown = Screen(columns)
    monkeypatch.setattr(progress.sys, "stdout", KeptStream(shown))
    monkeypatch.setattr(progress, "DELAY_S", 1e-9)
    monkeypatch.setattr(progress, "SHOW_EVERY_S", 0.0)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("GSPO_LANG", "en")
    return shown


def test_a_bar_below_a_table_leaves_nothing_behind(monkeypatch):
    screen = a_screen(monkeypatch, 80)
    table = progress.LiveTable({"step": 6, "reward": 6})
    table.show({"step": "1/9", "reward": "0.500"})
    with progress.track_sampling("sampling", 8, lambda: (2, 180)) as tick:
        tick()
        during = screen.lines
        progress.say("warning: something")
    table.show({"step": "2/9", "reward": "0.600"})
    table.close()
    assert during[:2] == ["  step  reward", "   1/9   0.500"] and "2/8 responses, " in during[2] and len(during) == 3
    assert [line for line in screen.lines if line] == [
        "  step  reward",
        "warning: something",
        "   2/9   0.600",
    ]


def test_a_terminal_without_movements_shows_no_bar_below_a_table(monkeypatch):
    screen = a_screen(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    table = progress.LiveTable({"step": 6})
    table.show({"step": "1/9"})
    with progress.track_sampling("sampling", 8, lambda: (2, 180)) as tick:
        tick()
    assert list(progress.track([1, 2], "scoring")) == [1, 2]
    table.close()
    assert "\x1b" not in screen.getvalue() and [line for line in screen.lines if line] == ["  step", "   1/9"]


def test_what_a_text_says_moves_no_cursor(monkeypatch):
    screen = a_screen(monkeypatch)
    progress.say("up \x1b[A")
    assert screen.lines[0] == "up \\x1b[A"


def test_chinese_titles_stand_above_their_columns(monkeypatch):
    screen = a_screen(monkeypatch)
    monkeypatch.setenv("GSPO_LANG", "zh")
    table = progress.LiveTable({"step": 9, "reward": 2, "left": 10})
    table.show({"step": "1/9", "reward": "1", "left": "3 h 05 min"})
    table.close()
    assert screen.lines[:2] == ["       步  奖励        剩余", "      1/9     1  3 时 05 分"]
    assert [width(line) for line in screen.lines[:2]] == [9 + 2 + 4 + 2 + 10] * 2


def test_sentences_are_broken_between_words_on_a_terminal_and_commands_are_not(monkeypatch):
    screen = a_screen(monkeypatch)
    command = "  evaluate   .venv/bin/python eval.py outputs/quick/checkpoints/step_000100"
    progress.say("the best checkpoint so far is that of the step before the last one\n" + command)
    assert screen.getvalue() == (f"the best checkpoint so far is that of the step before the\nlast one\n{command}\n")


def test_elsewhere_no_line_is_broken(capsys):
    progress.say("word " * 60)
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5900, "98 min"), (6000, "1 h 40 min"), (11100, "3 h 05 min")],
)
def test_time_left(seconds, text):
    assert progress.time_left(seconds) == text

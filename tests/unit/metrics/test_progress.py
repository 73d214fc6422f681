"""What a run prints between its start and its end: on a terminal and elsewhere, with a clock that is made up."""

import io
import itertools
import math
import re
import sys

import pytest

from gspo.metrics import progress
from gspo.metrics.progress import COLUMNS, Progress, held_out_line

ROW = {
    "round": 0.0, "reward_mean": 0.5, "reward_max": 0.75, "pairs/groups_without": 0.25, "response/cutoff": 0.125,
    "preference_accuracy": 0.625, "kl_divergence": 0.0625, "response/length_mean": 16.0, "tokens_per_second": 1000.0,
    "time/step": 10.0, "loss/total": 0.5, "pairs/gap_mean": 0.25,
}  # fmt: skip
OF_ROWS = {
    k: x for k, x in ROW.items() if k not in ("reward_mean", "reward_max", "response/cutoff", "tokens_per_second")
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture()
def clock(monkeypatch):
    """Ten seconds pass between two looks at the clock, the program began 100 s before the first."""
    monkeypatch.setattr(progress, "STARTED", -100.0)
    times = itertools.count(0, 10)
    monkeypatch.setattr("gspo.metrics.progress.time.monotonic", lambda: float(next(times)))


def a_terminal(monkeypatch, columns):
    """In the place of standard output; a fixture would be undone before the test."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    return terminal


def rows_of_the_table(screen):
    """The rows as they were shown, each once: a bar may draw itself more often."""
    parts = [part.split() for part in re.split(r"[\r\n]", screen.getvalue()) if re.match(r"\s+\d  +\d/\d", part)]
    return [*dict.fromkeys(map(tuple, parts))]


# ---- elsewhere: lines ----


def test_a_step_is_a_line(clock, capsys):
    shown = Progress(0)
    shown.begin()
    shown.step(1, ROW, total_steps=5)
    assert capsys.readouterr().out == (
        "step 1/5  round 1  reward 0.500  top 0.750  no pair 0.25  cut off 0.12  ordered 0.62  kl 0.0625  length 16.0  "
        "1000 tok/s  10.00 s  left 40 s\n"
    )


def test_a_step_of_stored_responses_has_no_rewards(clock, capsys):
    Progress(0).step(1, OF_ROWS, total_steps=1)
    out = capsys.readouterr().out
    assert "round 1  loss 0.5000  margin 0.250  no pair 0.25  ordered 0.62" in out
    assert not [word for word in ("reward", "cut off", "tok/s", "nan") if word in out]


def test_a_step_without_pairs_has_no_share_in_order(clock, capsys):
    Progress(0).step(1, {k: x for k, x in ROW.items() if k != "preference_accuracy"}, total_steps=1)
    assert "ordered -  kl" in capsys.readouterr().out


def test_steps_in_quick_succession_share_a_line_but_the_first_and_the_last(monkeypatch, capsys):
    monkeypatch.setattr("gspo.metrics.progress.time.monotonic", lambda: 5.0)
    shown = Progress(0)
    for step in range(1, 10):
        shown.step(step, ROW, total_steps=9)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if "reward" in line] == ["1/9", "9/9"]


def test_long_steps_are_estimated_in_whole_seconds(monkeypatch, capsys):
    monkeypatch.setattr(progress, "STARTED", 0.0)
    times = itertools.count(0, 380)
    monkeypatch.setattr("gspo.metrics.progress.time.monotonic", lambda: float(next(times)))
    shown = Progress(0)
    shown.begin()
    for step in range(1, 5):
        shown.step(step, ROW, total_steps=8)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "whole run" in line]
    assert said.endswith("5 more steps of 380 s")


@pytest.mark.parametrize("start", [0, 40])
def test_after_the_first_steps_the_whole_run_is_estimated_once(clock, capsys, start):
    """110 s before the first step ends, two steps of 10 s, 5 more of them and 60 s of evaluation."""
    shown = Progress(start)
    shown.after_s = 60.0
    shown.begin()
    for step in range(start + 1, start + 9):
        shown.step(step, ROW, total_steps=start + 8)
    lines = capsys.readouterr().out.splitlines()
    (said,) = [k for k, line in enumerate(lines) if "whole run" in line]
    assert lines[said] == "the whole run takes about 4 min: 5 more steps of 10 s and 60 s of evaluation"
    assert lines[said - 1].startswith(f"step {start + 3}/") and lines[said - 1].endswith("left 2 min")


def test_a_run_of_three_steps_is_not_estimated_when_it_is_over(clock, capsys):
    shown = Progress(0)
    for step in (1, 2, 3):
        shown.step(step, ROW, total_steps=3)
    assert "whole run" not in capsys.readouterr().out


# ---- what held-out prompts say ----

LOOK = {"round": 0.0, "heldout/accuracy": 0.961, "heldout/reward_mean": 0.95}


@pytest.mark.parametrize(
    ("step", "row", "before", "best", "line"),
    [
        (0, LOOK, math.nan, False, "before step 1: held-out accuracy 0.961, reward 0.950"),
        (7, LOOK, 0.398, False, "step 7: held-out accuracy 0.961 (was 0.398), reward 0.950"),
        (
            50,
            LOOK | {"win_rate": 0.77},
            0.398,
            True,
            "round 1 ends, step 50: held-out accuracy 0.961 (was 0.398), reward 0.950, win rate 0.77 over the policy "
            "that began the round; the best checkpoint so far",
        ),
        (7, {"round": 0.0, "heldout/reward_mean": 0.95}, math.nan, False, "step 7: held-out reward 0.950"),
    ],
)
def test_a_look_is_a_line(step, row, before, best, line):
    assert held_out_line(step, row, before, best) == line


def test_a_look_says_what_the_look_before_has_found_also_in_a_resumed_run(capsys):
    shown = Progress(4)
    shown.seen({"heldout/accuracy": 0.25})
    shown.seen({"reward_mean": 0.5})
    for step, accuracy in ((5, 0.5), (6, None), (7, 0.75)):
        look = {} if accuracy is None else {"heldout/accuracy": accuracy, "heldout/reward_mean": accuracy}
        shown.looked(step, {"round": 0.0, **look}, best=False)
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"step \d: held-out accuracy .*?\)", line)[0] for line in lines] == [
        "step 5: held-out accuracy 0.500 (was 0.250)",
        "step 7: held-out accuracy 0.750 (was 0.500)",
    ]


# ---- on a terminal: a table ----


def test_a_table_has_a_row_a_round_that_is_rewritten_at_each_step(clock, monkeypatch):
    """The last held-out accuracy stays; the time left is worked out from the steps so far."""
    screen = a_terminal(monkeypatch, 200)
    shown = Progress(0)
    shown.begin()
    for step, now in ((1, 0.0), (2, 0.0), (3, 1.0)):
        row = ROW | {"round": now, "reward_mean": 0.1 * step}
        shown.step(step, row | ({"heldout/accuracy": 0.4} if step == 1 else {}), total_steps=6)
        shown.looked(step, row | ({"heldout/accuracy": 0.4, "heldout/reward_mean": 0.5} if step == 1 else {}), False)
    shown.close()
    rows = rows_of_the_table(screen)
    assert [row[:2] for row in rows] == [("1", "1/6"), ("1", "2/6"), ("2", "3/6")]
    assert [row[2:6] for row in rows] == [(left, "s", reward, "0.400") for left, reward in
                                          (("50", "0.100"), ("40", "0.200"), ("30", "0.300"))]  # fmt: skip
    assert rows[0][6:] == ("0.25", "0.12", "0.0625", "0.62", "0.750", "16.0", "1000")
    assert "step 1: held-out accuracy 0.400, reward 0.500" in screen.getvalue()
    assert "the whole run takes about" in screen.getvalue()


@pytest.mark.parametrize(("columns", "last"), [(200, "tok/s"), (80, "kl"), (40, "reward")])
def test_a_narrow_terminal_shows_the_columns_that_fit(clock, monkeypatch, columns, last):
    screen = a_terminal(monkeypatch, columns)
    Progress(0).step(1, ROW, total_steps=9)
    titles = next(line for line in screen.getvalue().splitlines() if "round" in line)
    shown = [title for title in COLUMNS if re.search(rf"\b{title}\b", titles)]
    assert shown == [*COLUMNS][: [*COLUMNS].index(last) + 1] and len(titles) < columns

"""The page of the first run shows what `make train-quick` prints: what one waits for, and no false alarm."""

import re

import pytest
from repository import ROOT

from benchmarks.first_run import PAGES, SHOWN_STEPS, quick_run, transcript

PRINTED = """\
CPU, 2 threads, fp32 | model: the embedded model | kept in outputs/quick
before training: 40 / 512 responses, 2,451 tok/s, 4 s, about 1 min left
step 49/100  round 1  reward 0.900  left 50 s
step 50/100  round 1  reward 0.934  kl 0.0500  length 15.2  1234 tok/s  0.61 s  left 31 s
round 1 ends, step 50: held-out accuracy 0.961 (was 0.398), reward 0.950
round 2 begins: the opponent is now the policy of step 50
step 51/100  round 2  reward 0.947  kl 0.0000  length 15.2  1234 tok/s  0.61 s  left 2 min
checkpoint outputs/quick/checkpoints/step_000050, the best
the whole run takes about 2 min: 97 more steps of 0.61 s and 3 s of evaluation
done in 1 min 29 s; the last checkpoint: outputs/quick/checkpoints/step_000100
"""


def shown(page):
    """The transcript on a page."""
    return (ROOT / page).read_text(encoding="utf-8").partition("```text\n")[2].partition("\n```\n")[0]


def without_numbers(text):
    return re.sub(r"\d+\.\d+|\d+%", "#", text)


def test_speed_is_left_out_and_a_checkpoint_stands_behind_its_step():
    assert transcript(PRINTED).splitlines() == [
        "CPU, … threads, fp32 | model: the embedded model | kept in outputs/quick",
        "step 50/100  round 1  reward 0.934  kl 0.0500  length 15.2  … tok/s  … s  left …",
        "round 1 ends, step 50: held-out accuracy 0.961 (was 0.398), reward 0.950",
        "round 2 begins: the opponent is now the policy of step 50",
        "checkpoint outputs/quick/checkpoints/step_000050, the best",
        "step 51/100  round 2  reward 0.947  kl 0.0000  length 15.2  … tok/s  … s  left …",
        "the whole run takes about …: 97 more steps of … s and … of evaluation",
        "done in …; the last checkpoint: outputs/quick/checkpoints/step_000100",
    ]


def test_both_pages_have_the_same_transcript():
    english, chinese = map(shown, PAGES)
    assert english == chinese and english


def test_the_page_shows_what_the_console_is_to_tell():
    lines = shown(PAGES[0]).splitlines()
    parts = [part.partition(": ")[0] for part in lines[0].split(" | ")]
    assert parts == ["CPU, … threads, fp32", "model", "data", "reward", "kept in outputs/quick"]
    assert "rows)" in lines[0] and "right from 1 on" in lines[0]
    assert [line for line in lines if line.startswith(("warning", "alarm"))] == []
    steps = [line for line in lines if line.startswith("step ")]
    assert [int(re.match(r"step (\d+)/100", line)[1]) for line in steps] == [*SHOWN_STEPS]
    assert all(word in line for line in steps for word in ("no pair ", "cut off ", "ordered ", "left "))
    beginnings = ["before training: ", "before step 1: held-out", "round 1 ends, step 50: held-out", "round 2 begins"]
    beginnings += ["round 2 ends, step 100: held-out", "checkpoint ", "the whole run takes", "done in", "the best: "]
    assert [start for start in beginnings if not any(line.startswith(start) for line in lines)] == []
    assert "eval.before_and_after=false skips it" in "\n".join(lines)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_page_is_what_a_run_prints():
    """But for the numbers, which another processor may round differently."""
    again = transcript(quick_run())
    assert without_numbers(again) == without_numbers(shown(PAGES[0]))
    assert float(re.search(r"round 2 ends.* accuracy ([\d.]+)", again)[1]) > 0.9

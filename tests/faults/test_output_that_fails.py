"""Where a program prints to must not end it: a full disk, a pipe that nobody reads, no output at all."""

import json
import os
import subprocess
import sys

import pytest
import torch
from repository import ROOT

from gspo.config import Reward
from gspo.metrics.step_metrics import Meter, _observe_rewards
from gspo.metrics.tensorboard_file import TensorboardFile
from gspo.read_config import load_config
from gspo.reward.scorer import Scorer
from gspo.types import Prompt

PRINTS = """
import sys
from gspo.system import console
from gspo.system.program import guarded
console.LINE_EVERY_S = -1.0

def main():
    console.say("begun")
    for _ in console.track(range(3000), "x" * 100):
        print("y" * 100, flush=True)
        print("z" * 100, file=sys.stderr, flush=True)
    with console.track_sampling("sampling", 2, lambda: (1, 1)) as tick:
        tick()
    open(sys.argv[1], "w").write("done")

guarded(main)
"""
REDIRECTIONS = {
    "a full disk": "> /dev/full",
    "both to a full disk": "> /dev/full 2>&1",
    "a closed output": ">&-",
    "both closed": ">&- 2>&-",
    "all closed": "<&- >&- 2>&-",
    "a pipe that nobody reads": "| true",
    "both to a pipe that nobody reads": "2>&1 | true",
}


@pytest.mark.parametrize("name", REDIRECTIONS)
def test_a_program_goes_on_and_ends_well(tmp_path, name):
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; '{sys.executable}' -c \"$PROGRAM\" {tmp_path}/done {REDIRECTIONS[name]}"],
        cwd=ROOT, env={**os.environ, "PROGRAM": PRINTS}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "done").read_text() == "done"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_what_was_lost_is_said():
    program = "from gspo.system.program import guarded\nguarded(lambda: print('result'))"
    done = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -c \"$PROGRAM\" > /dev/full"],
        cwd=ROOT, env={**os.environ, "PROGRAM": program}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == (
        "warning: standard output did not take all that was printed (No space left on device).\n"
    ) and not done.returncode  # fmt: skip


@pytest.mark.parametrize("number", ["1e39", "-1e300", "float('inf')", "float('nan')", "10**400"])
def test_a_further_number_of_any_size_is_scored_and_logged(tmp_path, number):
    (tmp_path / "r.py").write_text(f"def compute_score(**_):\n    return {{'score': 0.5, 'perplexity': {number}}}\n")
    scorer = Scorer(Reward(path=str(tmp_path / "r.py"), workers=1))
    try:
        scores = scorer.score_texts([Prompt(0, [1], "1+1", "2", "d")], [["a", "b"]])
    finally:
        scorer.close()
    assert scores.rewards.tolist() == [[0.5, 0.5]] and scores.errors == 0
    meter = Meter()
    _observe_rewards(meter, scores)
    metrics = Meter.merge([meter.state()])
    json.loads(json.dumps(metrics))
    assert TensorboardFile(tmp_path, load_config(None), 0).metrics(1, metrics) is None
    if number in ("1e39", "-1e300"):
        assert metrics["reward/perplexity"] == float(number)
    assert all(torch.isfinite(part).all() or number not in ("1e39", "-1e300") for part in scores.parts.values())

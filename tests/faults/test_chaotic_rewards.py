"""Training goes on with a reward function that does everything wrong, and every fault is counted."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

CHAOS = """
import os, time, zlib

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    draw = zlib.crc32(f"{solution_str} {ground_truth}".encode()) % 100
    kinds = ["hang", "raise", "nan", "none", "text", "exit", "memory", "print"]
    if draw < len(kinds):
        with open(LOG, "a") as log:
            log.write(kinds[draw] + "\\n")
        match kinds[draw]:
            case "hang": time.sleep(1000)
            case "raise": raise KeyError(solution_str)
            case "nan": return float("nan")
            case "none": return None
            case "text": return "good"
            case "exit": os._exit(1)
            case "memory": bytearray(50 << 30)
            case "print": print("x" * 100_000_000)
    return float(solution_str.endswith(ground_truth))
"""


def alive(folder):
    """Command lines of processes that were started with MARK=folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={folder}\0".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes())
        except OSError:
            continue
    return found


@pytest.mark.timeout(1000)
@pytest.mark.slow
@pytest.mark.parametrize("steps", [8, pytest.param(200, marks=pytest.mark.hour)])
@pytest.mark.parametrize("on_error", ["zero", "skip_group"])
def test_training_goes_on_and_counts(run_program, tmp_path, steps, on_error):
    log = tmp_path / "log"
    log.touch()
    (tmp_path / "chaos.py").write_text(f"LOG = {str(log)!r}\n{CHAOS}")
    done = run_program(
        "train.py", "--config", "configs/quick.yaml", f"reward.path={tmp_path / 'chaos.py'}", "reward.timeout_s=1.5",
        f"reward.on_error={on_error}", "reward.workers=2", "reward.check_rows=0", "eval.before_and_after=false",
        "eval.round_prompts=0", "data.train_batch_size=8", f"trainer.max_steps={steps}",
        f"trainer.output_dir={tmp_path}",
        timeout=900, env={"MARK": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "quick" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == steps

    seen = Counter(log.read_text().split())
    # A process that ends is laid to a call only when it ends again: two lines for one fault.
    errors = sum(seen[kind] for kind in ("raise", "nan", "none", "text", "memory")) + seen["exit"] / 2
    assert sum(row["reward/errors"] for row in rows) == errors > 0
    assert sum(row["reward/timeouts"] for row in rows) == seen["hang"]
    assert done.stderr.count("warning:") <= 8, "each kind once"
    assert len(done.stdout) < 100_000, "what it prints is cut"
    assert alive(tmp_path) == [] and not os.path.exists(tmp_path / "core")
    if steps >= 200:
        assert all(seen[kind] for kind in ("hang", "raise", "nan", "none", "text", "exit", "memory", "print")), seen
        early, late = rows[steps // 4]["memory/peak_gib"], rows[-1]["memory/peak_gib"]
        assert late < 1.05 * early, (early, late)


@pytest.mark.slow
def test_a_step_without_a_single_score_is_logged_and_passed(run_program, tmp_path):
    """A judge that is down for everything: no rewards, no pairs, no crash."""
    (tmp_path / "down.py").write_text("def compute_score(**_):\n    raise ConnectionError('down')\n")
    done = run_program(
        "train.py", "--config", "configs/quick.yaml", f"reward.path={tmp_path / 'down.py'}", "trainer.max_steps=2",
        "reward.on_error=skip_group", "reward.check_rows=0", "eval.before_and_after=false", "data.train_batch_size=4",
        "eval.round_prompts=4", f"trainer.output_dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "quick" / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward/errors"] for row in rows] == [16, 16] and "reward_mean" not in rows[0]
    assert "reward nan" in done.stdout

"""The statistics of the learning table, by hand; a kept result is used only where it is one of the same run."""

import json
import random

import pytest

from benchmarks import learning
from benchmarks.learning import run
from benchmarks.learning_methods import Job
from benchmarks.learning_report import best_within_kl, difference, grid_score, task_table, verdict


def runs(*counts):
    """One run a list: how many of eight answers to each prompt were right."""
    return [{"correct_counts": c, "pass@1": sum(c) / len(c) / 8} for c in counts]


def test_a_constant_difference_has_an_interval_of_no_width():
    assert difference(runs([5, 3], [4, 6]), runs([3, 1], [2, 4])) == pytest.approx((0.25, 0.25, 0.25))


def test_runs_are_paired_by_prompt_and_by_seed():
    """Prompts that differ widely, but by the same for both methods, leave no doubt; shuffled they would."""
    mine = [0, 8, 1, 7, 2, 6] * 10
    theirs = [max(0, c - 1) for c in mine]
    _, low, high = difference(runs(mine, mine), runs(theirs, theirs))
    assert 0.06 < low < high < 0.14
    shuffled = random.Random(0).sample(theirs, len(theirs))
    _, low, high = difference(runs(mine, mine), runs(shuffled, shuffled))
    assert low < 0 < high


def test_seeds_are_drawn_as_well_as_prompts():
    """Two seeds that disagree: no number of prompts makes up for it."""
    _, low, high = difference(runs([6] * 500, [2] * 500), runs([4] * 500, [4] * 500))
    assert (low, high) == (-0.25, 0.25)


def test_a_verdict_needs_an_interval_off_zero():
    assert verdict((0.02, 0.001, 0.04)) == "ahead"
    assert verdict((-0.02, -0.04, -0.001)) == "behind"
    assert verdict((0.02, -0.001, 0.04)) == verdict((0.0, 0.0, 0.0)) == "tie"


def test_the_grid_is_judged_on_the_last_third_of_dev():
    assert grid_score({"dev": [0.0, 0.0, 0.0, 0.0, 0.4, 0.6]}) == pytest.approx(0.5)


def test_the_best_within_a_kl_passes_over_what_is_beyond():
    result = {"dev": [0.3, 0.5, 0.9], "dev_kl": [0.01, 0.1, 0.2]}
    assert best_within_kl(result) == 0.5
    assert best_within_kl({"dev": [0.9], "dev_kl": [0.2]}) != best_within_kl({"dev": [0.9], "dev_kl": [0.2]}), "none"


def test_a_line_of_the_table_by_hand():
    def of(count):
        return {
            **runs([count, count])[0], "pass@8": 1.0, "kl": 0.05, "length": 10.0, "dev": [0.5], "dev_kl": [0.01],
            "before": {"pass@1": 0.25, "pass@8": 0.9, "greedy": 0.2},
        }  # fmt: skip

    text = task_table({"ours": [of(6), of(6)], "theirs": [of(4), of(4)]}, {"ours": 1e-4, "theirs": 2e-4}, "theirs")
    _, _, before, ours, theirs = text.strip().splitlines()
    assert "0.250" in before and "0.900" in before
    assert "| ours | 0.0001 | 0.750 ± 0.000 |" in ours and "+0.250 [+0.250, +0.250] ahead" in ours
    assert theirs.endswith("| 10.0 |  |")


@pytest.mark.parametrize("change", ["code", "settings"])
def test_a_kept_result_counts_only_for_the_same_code_and_settings(tmp_path, monkeypatch, change):
    job = Job("equations", "GSPO", 1e-4, 0, ("a=1",))
    kept = job.folder(tmp_path) / "result.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"settings": ["v1", "a=1"], "pass@1": 0.5}))
    assert run(job, str(tmp_path), "v1")["pass@1"] == 0.5
    began = []
    monkeypatch.setattr(learning, "train_once", lambda *args: began.append(args) or {"settings": [], "pass@1": 0.7})
    other = (job, "v2") if change == "code" else (Job("equations", "GSPO", 1e-4, 0, ("a=2",)), "v1")
    assert run(other[0], str(tmp_path), other[1])["pass@1"] == 0.7 and len(began) == 1


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--out", "README.md/x"]])
def test_a_wrong_flag_is_one_line_and_exit_code_2(monkeypatch, capsys, flags):
    monkeypatch.setattr("sys.argv", ["learning.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        learning.main()
    assert stopped.value.code == 2 and f"error: {flags[0]}" in capsys.readouterr().err

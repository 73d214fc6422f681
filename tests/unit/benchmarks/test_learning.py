"""The learning benchmark: its statistics by hand, its climb over step sizes, and which results it uses again."""

import json
import random

import numpy as np
import pytest

from benchmarks import learning, learning_runs
from benchmarks.learning_methods import DEVELOPMENT, KL_WEIGHT, METHODS, REPORT, TUNING_SEEDS
from benchmarks.learning_report import bootstrap_differences, holm, interval, p_value, task_table, whole_table
from benchmarks.learning_runs import Job, Results, result_of
from benchmarks.learning_search import KL_RANGE, LR_RANGE, best_point, dev_score, neighbours

START = KL_WEIGHT[1]


def runs(*counts):
    """One run a list: how many of eight responses to each prompt were right."""
    return [{"correct_counts": c, "pass@1": sum(c) / len(c) / 8} for c in counts]


def difference(mine, theirs):
    means = bootstrap_differences([mine], [theirs])
    return (float(means.mean()), *interval(means, 0.95))


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


def test_the_p_value_is_the_two_sided_share_beyond_zero():
    assert p_value(np.array([-1.0, 1.0, 2.0, 3.0])) == 0.5  # one of four below: 2 x 1/4
    assert p_value(np.linspace(1, 2, 1000)) == 1 / 1000  # none: as small as the number of draws can tell


def test_holm_judges_the_second_smallest_p_value_at_a_weaker_level_and_stops_at_the_first_tie():
    """0.01 and 0.04 of three: 0.01 < 0.05 / 3, 0.04 > 0.05 / 2, so the second is a tie though 0.04 < 0.05, and the
    third is one whatever it is."""

    def sample(share):  # of 10,000 draws this share is below 0
        below = round(10_000 * share)
        return np.sort(np.concatenate([np.full(below, -0.01), np.full(10_000 - below, 0.01)]))

    verdicts = {k: v for k, (_, _, v) in holm({"a": sample(0.005), "b": sample(0.02), "c": sample(0.3)}).items()}
    assert verdicts == {"a": "ahead", "b": "tie", "c": "tie"}
    assert holm({"b": sample(0.02)})["b"][2] == "ahead"  # alone it would have been ahead
    assert holm({"b": -sample(0.02)[::-1]})["b"][2] == "behind"


def test_the_search_climbs_to_a_point_whose_neighbours_were_all_tried():
    """A hill with its top five factors of two away from the start, off the first grid on both axes."""

    def score(at, run):
        return -abs(np.log2(at[0] / 2e-4) - 3) - abs(np.log10(at[1] / 1e-3) - 1)

    best, scores = best_point(score, START)
    assert best == (1.6e-3, 1e-2)
    assert all(point in scores for point in neighbours(best))


def test_the_search_goes_on_from_the_first_better_neighbour():
    """On a slope to smaller steps it asks for no second neighbour before the end of the slope."""
    best, scores = best_point(lambda at, run: -at[0], START)
    assert best[0] < LR_RANGE[0] * 2 and list(scores)[:5] == [(2e-4 / 2**k, 1e-3) for k in range(5)]


def test_the_search_stops_at_the_ends_of_the_ranges():
    best, scores = best_point(lambda at, run: at[0] + at[1], START)
    assert max(LR_RANGE) / 2 < best[0] <= LR_RANGE[1] and best[1] == KL_RANGE[1]
    assert all(LR_RANGE[0] <= lr <= LR_RANGE[1] and KL_RANGE[0] <= kl <= KL_RANGE[1] for lr, kl in scores)


def test_a_lucky_run_does_not_choose_alone():
    """The best point of the climb is one of three that run again; the best mean wins."""
    luck = {(2e-4, 1e-3): (0.9, 0.2), (4e-4, 1e-3): (0.8, 0.6), (1e-4, 1e-3): (0.7, 0.8), (2e-4, 1e-2): (0.6, 1.0)}
    asked = []

    def score(at, run):
        asked.append((at, run))
        return luck.get(at, (0.0, 0.0))[run]

    assert best_point(score, START)[0] == (1e-4, 1e-3)
    assert sum(run for _, run in asked) == 3 and len(asked) == 8


def test_points_are_judged_on_the_last_half_of_dev():
    assert dev_score({"dev": [0.0, 0.0, 0.4, 0.6]}) == pytest.approx(0.5)


def test_what_chooses_never_answers_test_prompts():
    """The runs of a search are judged on the dev split, have a seed of their own, and do not even read test results."""
    seen = []

    def fake(job, results, scratch):
        seen.append(job)
        return {"dev": [0.5]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "result_of", fake)
        learning.search("equations", "RLOO", (), "file", "scratch", False)
    assert seen and all(not job.tested and job.seed in TUNING_SEEDS for job in seen)


def test_report_tasks_are_no_development_tasks():
    assert not DEVELOPMENT.keys() & REPORT.keys()


def test_a_line_of_the_table_by_hand():
    def of(count):
        return {
            **runs([count, count])[0], "pass@8": 1.0, "kl": 0.05, "length": 10.0, "dev": [0.5], "lr": 1e-4,
            "kl_coef": 0.01, "tokens": [1000, 24_000], "cpu_seconds": 7.0,
        }  # fmt: skip

    text = task_table({"ours": [of(6), of(6)], "theirs": [of(4), of(4)]}, {"pass@1": 0.25, "pass@8": 0.9}, "ours")
    _, _, before, ours, theirs = text.strip().splitlines()
    assert "0.250" in before and "0.900" in before
    assert ours.startswith("| ours | 0.0001 | 0.01 | 0.750 ± 0.000 |") and ours.endswith("| 24 | 7 |  |")
    assert theirs.endswith("+0.250 [+0.250, +0.250] ahead |")


def test_offline_dpo_is_searched_over_its_beta_and_reads_the_pairs_of_its_task():
    job = learning.make_job("sorting", "offline DPO", METHODS["offline DPO"], (1e-4, 0.1), 0, fast=False, tested=True)
    assert (
        "objective.preference_beta=0.1" in job.settings
        and "data.train_files=[data/sorting/pairs.jsonl]" in job.settings
    )
    assert not any(setting.startswith("objective.kl_coef") for setting in job.settings)
    online = learning.make_job("sorting", "PPO", METHODS["PPO"], (1e-4, 0.01), 0, fast=False, tested=True)
    assert "objective.kl_coef=0.01" in online.settings


def test_tasks_weigh_alike_in_the_table_of_all():
    """One task of a hundred prompts where ours is ahead by 1/4, one of ten where it is behind by 1/8."""
    by_task = {
        "large": {"ours": runs([6] * 100), "theirs": runs([4] * 100)},
        "small": {"ours": runs([4] * 10), "theirs": runs([5] * 10)},
    }
    _, _, ours, theirs = whole_table(by_task, "ours").strip().splitlines()
    assert ours == "| ours | 0.750 | 0.500 | 0.625 |  |"
    assert theirs == "| theirs | 0.500 | 0.625 | 0.562 | +0.062 [+0.062, +0.062] ahead |"


def a_job(**changed):
    return Job(**{**{"task": "equations", "method": "GSPO", "lr": 1e-4, "kl_coef": 1e-3, "seed": 0}, **changed})


def test_a_kept_result_counts_for_the_same_settings_only(tmp_path, monkeypatch):
    began = []
    monkeypatch.setattr(learning_runs, "train_once", lambda *args: began.append(args) or {"pass@1": 0.5})
    results = Results(tmp_path / "learning.jsonl")
    job = a_job(settings=("a=1",), tested=True)
    assert result_of(job, results, tmp_path)["pass@1"] == result_of(job, results, tmp_path)["pass@1"] == 0.5
    assert len(began) == 1
    result_of(a_job(settings=("a=2",), tested=True), results, tmp_path)
    result_of(a_job(settings=("a=1",), tested=False), results, tmp_path)
    assert len(began) == 3
    (line, *_) = (json.loads(line) for line in results.file.read_text().splitlines())
    assert line["settings"] == ["a=1"] and line["code"] == learning_runs.code_version() and line["day"]


@pytest.mark.parametrize(
    "flags", [["report", "--seeds", "0"], ["report", "--out", "README.md/x"], ["report", "--methods", "PPG"]]
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(monkeypatch, capsys, flags):
    monkeypatch.setattr("sys.argv", ["learning.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        learning.main()
    assert stopped.value.code == 2 and f"error: {flags[1]}" in capsys.readouterr().err

"""The benchmark beside TRL: both contestants get the same settings, and seconds are read off the curves by hand."""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.beside_trl import (
    OURS,
    TRL,
    WORKLOADS,
    Results,
    chosen_rate,
    climb,
    evaluation_config,
    make_job,
    our_command,
    their_command,
)
from benchmarks.beside_trl_report import at_pace, lines_of, search_lines, seconds_to
from gspo.read_config import load_config

ARGS = argparse.Namespace(steps=4, every=2, seeds=1, first=None, fast=False)
RUN = {"seconds": [10.0, 10.0, 20.0, 20.0], "steps": [2, 4], "pass@1": [0.4, 0.8]}


def settings_of(command):
    """The configuration that a contestant's command trains with."""
    config = command[command.index("--config") + 1]
    return load_config(config, [part for part in command if "=" in part and not part.startswith("--")])


@pytest.mark.parametrize("name", WORKLOADS)
def test_both_train_on_the_same_rows_with_as_many_samples_and_the_same_schedule(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[3])
    ours, theirs = (
        settings_of(command(make_job(name, method, 2e-5, 3, "test", ARGS), Path("out")))
        for command, method in ((our_command, OURS), (their_command, TRL))
    )
    for section in ("model", "data", "rollout", "reward", "optim"):
        assert getattr(ours, section) == getattr(theirs, section)
    assert (ours.trainer.max_steps, ours.trainer.seed) == (theirs.trainer.max_steps, theirs.trainer.seed) == (4, 3)
    assert ours.optim.learning_rate == 2e-5


def test_step_sizes_are_chosen_on_the_dev_split_and_judged_on_the_other():
    cfg = {s: evaluation_config(make_job("number_words", OURS, 1e-5, 7, s, ARGS)) for s in ("dev", "test")}
    assert {s: c.data.test_files for s, c in cfg.items()} == {
        "dev": ["data/number_words/dev.json"],
        "test": ["data/number_words/test.json"],
    }
    assert cfg["test"].trainer.seed == 0  # the same random keys for the models of all seeds


def test_the_step_size_is_that_of_the_highest_accuracy_during_the_run():
    asked = []

    class Found:
        def of(self, job):
            assert (job.split, job.seed, job.steps, job.every) == ("dev", 100, 2, 1)
            asked.append(job.lr)
            return {"pass@1": {3e-6: [0.2, 0.7], 6e-6: [0.3, 0.8], 1.2e-5: [0.7, 0.8], 2.4e-5: [0.7, 0.6]}[job.lr]}

    assert chosen_rate("number_words", TRL, Found(), ARGS) == 1.2e-5
    assert asked == [6e-6, 1.2e-5, 2.4e-5]  # half of 6e-6 was no neighbour of the best any more
    assert chosen_rate("number_words", OURS, None, ARGS) == 6e-6  # that of the configuration: no run
    assert chosen_rate("equations", TRL, None, ARGS) == 2e-4


def test_a_search_goes_on_until_both_neighbours_are_worse():
    value = {-3: 0.1, -2: 0.5, -1: 0.4, 0: 0.3, 1: 0.2}
    tried = []

    def accuracy(lr):
        tried.append(round(math.log2(lr)))
        return value[tried[-1]]

    assert climb(1.0, accuracy) == 0.25
    assert tried == [0, 1, -1, -2, -3]


def test_seconds_to_an_accuracy_lie_on_the_line_between_two_evaluations():
    assert seconds_to(0.3, RUN, start=0.2) == pytest.approx(10.0)  # half way to the first, after 20 s
    assert seconds_to(0.6, RUN, start=0.2) == pytest.approx(40.0)  # half way from 20 s to 60 s
    assert seconds_to(0.9, RUN, start=0.2) == float("inf")


def test_the_table_says_when_thirty_five_points_are_gained_or_that_they_are_not():
    start = {"pass@1": 0.25, "greedy": 0.3, "pass@8": 0.7}
    run = RUN | {"greedy": [0.5, 0.9], "pass@8": [0.8, 0.95], "tokens": [100] * 4, "cpu_seconds": 9.0, "lr": 1e-5}
    slow = run | {"pass@1": [0.3, 0.5]}
    text = lines_of({OURS: [run, run], TRL: [slow]}, start)
    assert "seconds to 0.60" in text and "40 ± 0" in text and "not all seeds reach it" in text


def test_a_run_is_kept_and_another_seed_is_another_run(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.beside_trl.run", lambda job, scratch: {"pass@1": [job.seed / 10]})
    job, results = make_job("number_words", OURS, 1e-5, 1, "test", ARGS), Results(tmp_path / "runs.jsonl", tmp_path)
    assert results.of(job)["pass@1"] == [0.1]
    assert results.of(replace(job, seed=2))["pass@1"] == [0.2]
    monkeypatch.setattr("benchmarks.beside_trl.run", None)
    assert results.of(job)["pass@1"] == [0.1]


def test_a_search_counts_every_step_as_the_fastest_and_says_when_an_accuracy_is_reached():
    ours = at_pace(RUN | {"cpu_seconds": 50.0, "gib": 1.0}, [RUN])  # 20 s to .4, 40 s to .8
    theirs = RUN | {"seconds": [90.0, 40.0], "steps": [1, 2], "pass@1": [0.5, 0.6], "cpu_seconds": 50.0, "gib": 2.0}
    theirs = at_pace(theirs, [theirs, RUN | {"seconds": [30.0]}])
    first, second = search_lines({"ours": ours, "theirs": theirs}, 0.2).splitlines()[2:]
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        *("ours", "0.400 after 2, 0.800 after 4", "10", "40", "30", "50", "1.0"),
    ]
    assert [cell.strip() for cell in second.split("|")[1:-1]] == [
        *("theirs", "0.500 after 1, 0.600 after 2", "30", "not in 60", "60", "50", "2.0"),
    ]

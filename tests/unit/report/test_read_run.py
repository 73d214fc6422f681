"""What the page of a run is made of, and what is said of a folder that holds none."""

import json
import math
import re

import pytest
from run_on_disk import group, write_run

from gspo.errors import UserError
from gspo.report import read_run as module
from gspo.report.__main__ import main
from gspo.report.read_run import compact, fit, read_run, thinned
from gspo.system.program import guarded


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = read_run(write_run(tmp_path / "a", steps=6, rounds=2, samples={2: [group()]}, accuracy=0.8))
    assert (run.name, run.last_step, run.rounds) == ("a", 6, [(1, 1), (4, 2)])
    assert run.curves["kl_divergence"] == ([1, 2, 3, 4, 5, 6], [0.01, 0.02, 0.03, 0.04, 0.05, 0.06])
    assert run.settings["rollout.n"] == "8" and run.settings["model.path"] == "null"
    assert run.tables[""]["after"]["numbers"] == {"greedy": [0.8, 0.7000000000000001, 0.9]}
    assert {source: [*table] for source, table in run.tables.items()} == {
        "": ["before", "after"],
        "x": ["before", "after"],
    }
    assert run.prompts == ["2 + 2"]
    assert run.samples == [[2, 0, "4", [["is 4", 1.0, 2], ["is 5", 0.0, 1]], 0, 1]]


def test_a_long_curve_is_thinned_to_means():
    steps, values = thinned([(step, float(step)) for step in range(1, 2501)], most=1000)
    assert len(steps) == 834 and steps[:2] == [3, 6] and steps[-1] == 2500 and values[:2] == [2.0, 5.0]
    assert thinned([(1, math.nan), (2, 3.0)], most=10) == ([1, 2], [None, 3.0])
    assert thinned([(1, math.inf), (2, 3.0)], most=1) == ([2], [3.0])


def test_responses_are_ranked_and_equal_ones_counted():
    rows = [{"step": 1, **group("p", ("a", "b", "a", "c"), (0.1, 0.9, 0.1, 0.5), pair=None, truth=["x", "y"])}]
    prompts, samples = compact(rows * 2)
    assert prompts == ["p"]
    assert samples[0] == [1, 0, '["x", "y"]', [["b", 0.9, 1], ["c", 0.5, 1], ["a", 0.1, 2]], None, None]


def test_samples_too_many_for_a_page_are_thinned_by_steps_and_that_is_said(tmp_path):
    samples = {step: [group(responses=("x" * 50, "y" * 50), rewards=(1.0, 0.0))] * 2 for step in range(1, 9)}
    run = read_run(write_run(tmp_path / "a", steps=8, samples=samples))
    assert fit([run], most=1600) == 1 and len(run.samples) == 16 and run.notes == []
    assert fit([run], most=800) == 2
    assert [row[0] for row in run.samples] == [1, 1, 2, 2, 4, 4, 6, 6, 8, 8]
    assert run.notes == ["samples of one step in 2 only: all of them would be too large for a page"]


def test_a_run_that_is_writing_a_line_is_read_up_to_it(tmp_path):
    folder = write_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rou')
    run = read_run(folder)
    assert run.last_step == 6
    assert run.notes == ["metrics.jsonl: its last line is not finished and is left out"]


def test_evaluations_that_are_not_alike_do_not_stand_side_by_side(tmp_path):
    folder = write_run(tmp_path / "a")
    report = json.loads((folder / "eval_before.json").read_text())
    report["settings"]["n"] = 3
    (folder / "eval_before.json").write_text(json.dumps(report))
    run = read_run(folder)
    assert [*run.tables[""]] == ["after"] and "numbers of samples (eval.n)" in run.notes[0]


def damage(file, text):
    return lambda folder: (folder / file).write_text(text)


WRONG = {
    "no run": (lambda folder: (folder / "metrics.jsonl").unlink(), "is not a run's folder: there is no metrics.jsonl"),
    "no steps": (damage("metrics.jsonl", ""), "holds no steps yet"),
    "no JSON": (damage("metrics.jsonl", "x\n"), r"metrics.jsonl, line 1 is damaged: 'x' is no JSON"),
    "another version": (
        damage("metrics.jsonl", '{"step": 1, "reward": 2}\n'),
        "line 1 was not written by this version",
    ),
    "a text": (damage("metrics.jsonl", '{"step": 1, "round": 0, "x": "y"}\n'), "was not written by this version"),
    "samples": (damage("samples.jsonl", '{"step": 1, "prompt": "p"}\n'), "samples.jsonl, line 1 was not written by"),
    "numbers": (
        damage("samples.jsonl", '{"step": 1, "prompt": "p", "responses": ["a"], "rewards": ["b"]}\n'),
        "samples.jsonl, line 1 was not written by",
    ),
    "escapes": (damage("metrics.jsonl", "\x1b[2J\n"), re.escape(r"damaged: '\\x1b[2J'")),
    "no settings": (lambda folder: (folder / "config.yaml").unlink(), "config.yaml cannot be read: No such file"),
    "no YAML": (damage("config.yaml", "a: [1"), "config.yaml cannot be read: it is no YAML"),
    "other YAML": (damage("config.yaml", "lr: {a: 1}"), "config.yaml was not written by this version"),
    "evaluation": (damage("eval_after.json", '{"step"'), "eval_after.json is damaged or of another version"),
    "part of an evaluation": (
        damage(
            "eval_after.json",
            '{"step": 6, "settings": {}, "prompts": 1, "samples": 1, "interval": {"a": [0.1]}, "a": 1}',
        ),
        "eval_after.json is damaged or of another version",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_folder_that_cannot_be_shown_is_one_paragraph_and_exit_code_2(name, tmp_path, monkeypatch, capsys):
    change, said = WRONG[name]
    change(write_run(tmp_path / "a"))
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "a")])
    with pytest.raises(SystemExit) as end:
        guarded(main)
    told = capsys.readouterr()
    assert end.value.code == 2 and told.out == ""
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and re.search(said, told.err), told.err
    assert not (tmp_path / "a" / "report.html").exists()


def test_a_folder_of_runs_names_them(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / name)
    with pytest.raises(UserError, match="Name one of the runs in it: one, two"):
        read_run(tmp_path)


def test_limits_of_a_page_are_what_a_browser_takes():
    assert module.MOST_POINTS <= 1000 and module.MOST_CHARACTERS <= 32_000_000

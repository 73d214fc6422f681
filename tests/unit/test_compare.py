"""Runs side by side: what differs, what they reached, what it cost."""

import json
import re

import pytest
from run_on_disk import write_run

from gspo.checkpoint import fingerprints
from gspo.compare import comparison, main, read_figures
from gspo.errors import UserError


def rewrite(folder, **curves):
    """Give steps of metrics.jsonl further values: curve -> {step: value}."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {name.replace("__", "/"): at[row["step"]] for name, at in curves.items() if row["step"] in at}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture()
def two(tmp_path):
    one = write_run(tmp_path / "one", settings=["optim.learning_rate=3e-4"], accuracy=0.8)
    other = write_run(tmp_path / "two", settings=["optim.learning_rate=1e-4"], accuracy=0.6, steps=4)
    rewrite(one, heldout__accuracy={3: 0.9, 6: 0.7}, tokens_sampled={6: 12345.0})
    rewrite(other, heldout__accuracy={4: 0.5})
    return one, other


def lines_of(*folders):
    text = comparison([read_figures(folder) for folder in folders])
    return {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in text.splitlines() if "  " in line}, text


def test_what_differs_what_was_reached_and_what_it_cost(two):
    rows, text = lines_of(*two)
    assert rows["settings that differ"] == ["one", "two"]
    assert rows["optim.learning_rate"] == ["0.0003", "0.0001"] and "rollout.n" not in rows
    assert rows["held-out accuracy, last"] == ["0.700 (step 6)", "0.500 (step 4)"]
    assert rows["held-out accuracy, best"] == ["0.900 (step 3)", "0.500 (step 4)"]
    assert rows["greedy before"] == ["0.400 [0.300, 0.500]", "0.300 [0.200, 0.400]"]
    assert rows["greedy after"] == ["0.800 [0.700, 0.900]", "0.600 [0.500, 0.700]"]
    assert rows["steps"] == ["6", "4"] and rows["tokens sampled"] == ["12,345", "-"]
    assert rows["time of the steps"] == ["3 s", "2 s"], "half a second a step"
    assert "warning" not in text and "note" not in text


def test_figures_that_do_not_compare_are_said(two):
    one, other = two
    fingerprints.write(one, {"data.val_files": "4 rows a"})
    fingerprints.write(other, {"data.val_files": "4 rows b"})
    for name in ("eval_before", "eval_after"):
        report = json.loads((other / f"{name}.json").read_text())
        report["settings"]["n"] = 9
        (other / f"{name}.json").write_text(json.dumps(report))
    _, text = lines_of(one, other)
    assert "warning: the runs have different held-out prompts" in text
    assert "evaluated with different numbers of samples (eval.n): those do not compare" in text


def test_a_run_that_began_in_the_middle_is_said_to_have_cost_more_than_its_time(two):
    """... as a branch from another run's checkpoint: its tokens are counted from the first step on."""
    one, other = two
    steps = (other / "metrics.jsonl").read_text().splitlines()
    (other / "metrics.jsonl").write_text("\n".join(steps[2:]) + "\n")
    _, text = lines_of(one, other)
    assert (
        "note: two: it begins with step 3: tokens sampled and rounds count what came before, the time does not." in text
    )
    assert "note: one" not in text


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    rows, _ = lines_of(*(write_run(tmp_path / where / "a") for where in ("x", "y")))
    assert [name[-3:] for name in rows["cost"]] == ["x/a", "y/a"]


def test_what_a_stranger_wrote_is_shown_and_not_obeyed(two):
    one, other = two
    config = (one / "config.yaml").read_text().replace("system_prompt: null", 'system_prompt: "\\e[2J\\nx"')
    (one / "config.yaml").write_text(config)
    report = json.loads((other / "eval_after.json").read_text())
    (other / "eval_after.json").write_text(json.dumps(report | {"interval": {"\x1b[2J": [0, 1], "greedy": 7}}))
    rows, text = lines_of(one, other)
    assert "\x1b" not in text and rows["data.system_prompt"] == [r"\x1b[2J x", "null"]
    assert rows["greedy after"] == ["0.800 [0.700, 0.900]", "-"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["one"], "name at least two runs, each once"),
        (["one", "one/checkpoints/.."], "name at least two runs, each once"),
        (["one", "three"], "three is no folder"),
        (["one", "bomb"], "bomb/config.yaml cannot be read"),
    ],
)
def test_mistakes_are_named(given, says, two, tmp_path, monkeypatch):
    (two[0] / "checkpoints").mkdir()
    bomb = write_run(tmp_path / "bomb")
    (bomb / "config.yaml").write_text("model: {path: &a [x, x]}\ndata: {train_files: [*a, *a]}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["compare", *given])
    with pytest.raises(UserError, match=says):
        main()

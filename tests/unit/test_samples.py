"""What a model answered, on a terminal."""

import json
import subprocess
import sys

import pytest
from repository import ROOT
from run_on_disk import group, write_run

from gspo.errors import UserError
from gspo.samples import choose, main, open_groups, show_group

FULL = {
    "step": 3,
    **group("2 + 2", ("is 5", "is\n4"), (0.0, 1.0), pair=(1, 0)),
    "model_input": "<|user|>2 + 2<|assistant|>",
    "lengths": [7, 9],
    "finish_reasons": ["length", "stop"],
    "reward_parts": {"format": [None, 0.5]},
}


def test_a_group_is_shown_with_all_that_is_known_of_it():
    assert show_group(FULL).splitlines() == [
        "step 3: mean reward 0.500, 1 of 2 cut off",
        "  prompt",
        "    <|user|>2 + 2<|assistant|>",
        "  ground truth  4",
        "  reward 1.000, 9 tokens, chosen, format 0.5",
        "    is",
        "    4",
        "  reward 0.000, 7 tokens, CUT OFF, rejected",
        "    is 5",
    ]


def test_an_answer_of_an_evaluation_is_shown_with_how_it_was_read():
    greedy = {"responses": ["is 3"], "rewards": [0.0], "predictions": ["3"], "correct": [False]}
    row = {**FULL, "predictions": ["5", "4"], "correct": [False, True], "greedy": greedy}
    shown = show_group({name: x for name, x in row.items() if name not in ("step", "chosen", "rejected")})
    assert shown.startswith("mean reward 0.500") and "9 tokens, right, read as '4', format 0.5" in shown
    assert shown.endswith("  greedy: reward 0.000, wrong, read as '3'\n    is 3")


def test_what_an_older_version_or_a_stranger_wrote_is_shown_as_far_as_it_goes():
    older = {"step": 1, **group("p", ("a",), (1.0,), pair=None)}
    strange = {"lengths": 7, "finish_reasons": ["x", "y"], "reward_parts": [1], "greedy": {"responses": 3}}
    assert show_group({**older, **strange}) == show_group(older)


def test_no_character_of_an_answer_acts_on_the_terminal():
    text = "\x1b[2J\x9b31m\rx\u202e"
    row = {**FULL, "model_input": text, "ground_truth": text, "responses": [text, text], "predictions": [text, text]}
    shown = show_group({**row, "reward_parts": {text: [1.0, 1.0]}})
    assert not set(shown) & set("\x1b\x9b\r\u202e") and shown.count("\\x1b[2J") == 8


def test_the_last_step_a_step_and_the_worst_of_it_are_found(tmp_path):
    rows = {1: [group("a")], 2: [group("b"), group("c", rewards=(0.0, 0.0, 0.0)), group("d", rewards=(0.0, 0.0, 1.0))]}
    folder = write_run(tmp_path / "a", samples=rows)
    found, path = open_groups(str(folder), None)

    def names(step, worst):
        return [row["prompt"] for row in choose(found, step, worst, path)]

    assert names(None, None) == ["b", "c", "d"] and names(1, 5) == ["a"] and names(2, 2) == ["c", "d"]
    with pytest.raises(UserError, match="samples.jsonl holds no groups of step 7. It holds those of 2 steps, 1 to 2"):
        choose(found, 7, None, path)


def test_an_evaluation_is_read_from_the_run_and_from_a_file(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "a")
    line = json.dumps({"step": 6, **group("asked")}) + "\n"
    (folder / "eval_after_answers.jsonl").write_text(line)
    for given in ([folder, "--eval", "after"], [folder / "eval_after_answers.jsonl"]):
        monkeypatch.setattr("sys.argv", ["samples", *map(str, given)])
        main()
        assert "step 6: mean reward 0.667\n  prompt\n    asked\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["a", "--worst", "0"], "--worst 0: it must be at least 1"),
        (["a"], "samples.jsonl holds no groups yet"),
        (["a", "--eval", "before"], "holds no eval_before_answers.jsonl.*eval.before_and_after"),
        (["nothing"], "nothing is no folder. Name a run"),
        (["pipe"], "is a pipe or a device"),
    ],
)
def test_mistakes_are_named(given, says, tmp_path, monkeypatch):
    import os

    folder = write_run(tmp_path / "a", samples={})
    (folder / "eval_before_answers.jsonl").unlink()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["samples", *given])
    with pytest.raises(UserError, match=says):
        main()


def test_a_reader_that_leaves_early_sees_no_traceback(tmp_path):
    folder = write_run(tmp_path / "a", samples={6: [group("p" * 1000)] * 300})
    command = f"{sys.executable} -m gspo.samples {folder} | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "step 6: mean reward 0.667\n" and "Traceback" not in done.stderr

"""Run folders of which something is gone or damaged: nothing is mixed up, and nothing is lost without a word."""

import json

import pytest
from saved_run import ALONE, a_run

from gspo.checkpoint.evaluations import needs_evaluation, settings_of, write_evaluation
from gspo.checkpoint.run_folder import open_run
from gspo.errors import UserError
from gspo.launch_checks import final_words
from gspo.read_config import load_config
from gspo.system.files import remove

ROWS, SOURCE = "4 rows abc", "def compute_score(): ..."
SETTINGS = settings_of(2, ROWS, SOURCE)
REPORT = {"prompts": 4, "samples": 2, "pass@1": 0.25, "interval": {"pass@1": [0.0, 0.5]}}


@pytest.fixture()
def run(tmp_path, tokenizer):
    """A run of six steps, with its curves and both evaluations."""
    run = a_run(tmp_path, tokenizer)
    run.save(6)
    (run.folder / "metrics.jsonl").write_text('{"step": 6}\n')
    write_evaluation(run.folder, "eval_before", 0, SETTINGS, REPORT, [])
    write_evaluation(run.folder, "eval_after", 6, SETTINGS, REPORT, [])
    return run


def again(run, *overrides):
    cfg = load_config("configs/quick.yaml", [f"trainer.output_dir={run.folder.parent}", *overrides])
    return open_run(cfg, ALONE)


@pytest.mark.parametrize("gone", ["checkpoints", "checkpoints/step_000006"])
@pytest.mark.parametrize("other", [[], ["optim.learning_rate=0.5", "trainer.seed=9", "objective.algorithm=grpo"]])
def test_a_run_whose_checkpoints_were_moved_away_is_kept_beside_the_new_one(run, capsys, gone, other):
    remove(run.folder / gone)
    (run.folder / "metrics.jsonl.part").write_text("unfinished")
    assert again(run, *other) == (run.folder, None)
    assert "the earlier run is kept as" in capsys.readouterr().out
    (kept,) = [p for p in run.folder.parent.iterdir() if p.name.startswith("quick-")]
    assert (kept / "metrics.jsonl").read_text() == '{"step": 6}\n' and (kept / "eval_after.json").exists()
    assert not list(kept.rglob("*.part"))
    assert sorted(p.name for p in run.folder.iterdir()) == ["checkpoints", "config.yaml", "fingerprints.json"]


def test_an_attempt_that_reached_no_step_leaves_nothing_to_the_next(run):
    remove(run.folder / "checkpoints")
    for name in ("metrics.jsonl", "eval_after.json"):
        remove(run.folder / name)
    again(run)
    assert not list(run.folder.glob("eval_before*"))


def test_settings_that_a_cut_config_no_longer_names_are_compared_by_their_defaults(run):
    (run.folder / "config.yaml").write_text("model:\n  path: null\n")
    with pytest.raises(UserError, match="holds a run with"):
        again(run)


@pytest.mark.parametrize(
    "changed",
    [
        {"step": 9},
        {"settings": settings_of(4, ROWS, SOURCE)},
        {"settings": settings_of(2, "8 rows def", SOURCE)},
        {"settings": settings_of(2, ROWS, "another")},
    ],
)
def test_an_evaluation_of_another_step_or_other_settings_is_done_again(run, changed):
    wanted = {"step": 6, "settings": SETTINGS}
    assert not needs_evaluation(run.folder, "eval_after", world=ALONE, **wanted)
    assert needs_evaluation(run.folder, "eval_after", world=ALONE, **{**wanted, **changed})


def test_evaluations_of_other_settings_are_not_put_side_by_side(run):
    newest = run.folder / "checkpoints" / "step_000006"
    assert "before" in final_words(run.folder, newest).splitlines()[2]
    write_evaluation(run.folder, "eval_after", 6, settings_of(4, ROWS, SOURCE), {**REPORT, "samples": 4}, [])
    words = final_words(run.folder, newest)
    assert "4 samples each" in words and words.splitlines()[2].split() == ["after"]
    assert "eval_before.json is not shown: before and after are of different numbers of samples (eval.n)." in words


def test_an_evaluation_of_an_earlier_step_is_not_shown_as_the_one_after_training(run):
    words = final_words(run.folder, run.folder / "checkpoints" / "step_000009")
    assert words.splitlines()[2].split() == ["before"]
    assert "eval_after.json is of step 6, this is step 9: it is not shown." in words


@pytest.mark.parametrize(
    "content", ["", '{"step": 6', "[]", '{"step": 0}', "null", "[" * 100_000, "\x00", json.dumps({"step": 6}), None]
)
def test_a_damaged_evaluation_is_done_again_and_never_ends_a_run(run, content):
    file = run.folder / "eval_after.json"
    remove(file)
    file.mkdir() if content is None else file.write_text(content)
    assert needs_evaluation(run.folder, "eval_after", 6, SETTINGS, ALONE)
    assert final_words(run.folder, run.folder / "checkpoints" / "step_000006").splitlines()[2].split() == ["before"]

"""A run is named in the same ways to every program."""

import os
import shutil

import pytest
from run_on_disk import write_run
from saved_run import ALONE

import eval as evaluation
from gspo import export, sample
from gspo.checkpoint.find_runs import checkpoint_of, run_folder_of
from gspo.errors import UserError

NEWEST = ("outputs", "outputs/checkpoints", "outputs/a", "outputs/a/checkpoints", "outputs/a/checkpoints/step_000004")
BEST = ("outputs/best", "outputs/checkpoints/best", "outputs/a/best", "outputs/a/checkpoints/best")


@pytest.fixture()
def outputs(tmp_path, monkeypatch):
    """outputs/a, the latest run, with two checkpoints of which the first is the best, and outputs/b."""
    for name in ("a", "b"):
        folder = write_run(tmp_path / "outputs" / name)
        for step in ("step_000002", "step_000004"):
            (folder / "checkpoints" / step / "trainer").mkdir(parents=True)
            (folder / "checkpoints" / step / "trainer" / "state.json").write_text("{}")
    (tmp_path / "outputs" / "a" / "checkpoints" / "best").symlink_to("step_000002")
    (tmp_path / "outputs" / "checkpoints").symlink_to("a/checkpoints")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


def resolved(name):
    return os.path.realpath(name).removeprefix(os.path.realpath(".") + "/")


@pytest.mark.parametrize("name", [*NEWEST, *BEST])
def test_every_name_of_a_run_leads_to_its_checkpoint_and_to_its_folder(name, outputs):
    step = "step_000004" if name in NEWEST else "step_000002"
    assert resolved(checkpoint_of(name)) == f"outputs/a/checkpoints/{step}"
    assert checkpoint_of(name).endswith(step), "the step is told, not that it is the best"
    assert str(run_folder_of(name)) == "outputs/a"
    assert run_folder_of(outputs.parent / name) == outputs / "a"


class OpenedError(Exception):
    """Carries the model that a program opens first."""


def opened(*args, **kwargs):
    raise OpenedError(next(str(x) for x in args if x))


@pytest.mark.parametrize("name", [NEWEST[0], NEWEST[2], NEWEST[3], NEWEST[4], BEST[2], BEST[3]])
def test_every_program_that_opens_a_model_takes_every_name(name, outputs, monkeypatch, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    monkeypatch.setattr(evaluation, "check_model", opened)
    monkeypatch.setattr(sample, "_open", opened)
    monkeypatch.setattr(export, "_check_source", opened)
    for program, given in (
        (lambda: evaluation.run_evaluation(evaluation.options(), ALONE), [name]),
        (sample.main, [name, "p.jsonl", "a.jsonl"]),
        (export.main, [name, "my-model"]),
    ):
        monkeypatch.setattr("sys.argv", ["program", *given])
        with pytest.raises(OpenedError, match="step_000002" if name in BEST else "step_000004"):
            program()


def test_what_is_no_run_is_left_as_it_is(outputs):
    for name in ("OWNER/NAME", "best", "OWNER/best", "nothing/here"):
        assert checkpoint_of(name) == name
    (outputs / "model" / "best").mkdir(parents=True)
    (outputs / "model" / "best" / "config.json").write_text("{}")
    assert checkpoint_of("outputs/model/best") == "outputs/model/best", "a model that is called so"
    assert str(run_folder_of("outputs/model")) == "outputs/model"


def test_a_run_without_what_was_named_says_so(outputs):
    with pytest.raises(UserError, match=r"outputs/b/best: no checkpoint was kept as the best.*newest is .*step_000004"):
        checkpoint_of("outputs/b/best")
    shutil.rmtree("outputs/b/checkpoints")
    with pytest.raises(UserError, match="outputs/b is a run that has no checkpoint yet"):
        checkpoint_of("outputs/b")
    with pytest.raises(UserError, match="outputs/c is no folder. Name a run"):
        run_folder_of("outputs/c")


def test_of_several_runs_without_a_latest_one_has_to_be_named(outputs):
    (outputs / "checkpoints").unlink()
    for find in (checkpoint_of, run_folder_of):
        with pytest.raises(UserError, match="outputs holds several runs. Name one of them: a, b"):
            find("outputs")
    shutil.rmtree("outputs/b")
    assert str(run_folder_of("outputs")) == "outputs/a" and checkpoint_of("outputs").endswith("step_000004")


def test_a_link_of_a_run_that_leads_out_of_it_is_not_its_best(outputs, tmp_path):
    (tmp_path / "private").mkdir()
    (outputs / "b" / "checkpoints" / "best").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="no checkpoint was kept as the best"):
        checkpoint_of("outputs/b/best")

"""What eval.py is given: which model, which limits, and what is refused before anything is sampled."""

import shutil
import sys

import pytest
from saved_run import ALONE, a_run

import eval as evaluation
from gspo.embedded import MODEL_DIR
from gspo.errors import UserError


def evaluate(monkeypatch, *given):
    """Run eval.py, which must not come to sampling."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, given)])
    monkeypatch.setattr(evaluation, "evaluate", lambda name, cfg, world: pytest.fail(f"sampled: {name}"))
    evaluation.run_evaluation(evaluation.options(), ALONE)


@pytest.mark.parametrize("limit", ["-1", "0"])
def test_a_limit_below_one_is_refused(monkeypatch, limit):
    with pytest.raises(UserError, match=rf"--limit {limit}: it must be at least 1"):
        evaluate(monkeypatch, "--limit", limit)


@pytest.mark.parametrize("place", ["MODEL", "--compare"])
def test_a_model_that_is_not_there_is_named_by_its_place_before_anything_is_sampled(monkeypatch, place):
    given = ["nosuchdir"] if place == "MODEL" else ["--compare", "nosuchdir"]
    with pytest.raises(UserError, match=rf"{place} = 'nosuchdir' is no folder here"):
        evaluate(monkeypatch, *given)


def test_the_folder_of_a_run_is_evaluated_by_its_newest_checkpoint(monkeypatch, tmp_path, tokenizer):
    run = a_run(tmp_path, tokenizer)
    run.save(4)
    shutil.copytree(MODEL_DIR, run.folder / "checkpoints" / "step_000004", dirs_exist_ok=True)
    for folder in (run.folder, run.folder.parent, run.folder / "checkpoints"):
        with pytest.raises(pytest.fail.Exception, match="sampled: .*step_000004"):
            evaluate(monkeypatch, folder)


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        (["rollout.n=4"], "write --n 4."),
        (["outputs", "trainer.seed=1"], "write --seed 1."),
        (["--data", "embedded", "eval.n=4"], "write --n 4."),
        (["rollout.top_k=5"], "`eval.py --help` lists them."),
    ],
)
def test_a_setting_is_answered_with_the_flag(monkeypatch, given, cure):
    monkeypatch.setattr(sys, "argv", ["eval.py", *given])
    with pytest.raises(UserError, match="eval.py takes flags, no section.key=value") as e:
        evaluation.options()
    assert str(e.value).endswith(cure)

"""Runs that learn from rows: written by `python -m gspo.sample`, trained on by DPO and GSPO, resumed, on two ranks."""

import json
import re

import pytest
from quick_run import assert_equal_bits, finished
from ranks import gradient
from safetensors.torch import load_file

from gspo.embedded import equations
from gspo.reward.reward_func import compute_score
from gspo.sample import with_pair

FEW = ("optim.epochs_per_rollout=1", "optim.minibatches=1", "eval.before_and_after=false", "eval.round_prompts=4",
       "trainer.save_freq=2", "trainer.max_steps=4", "data.train_batch_size=6")  # fmt: skip


def test_a_pair_is_the_best_and_the_worst_beyond_the_margin():
    row = {"prompt": "p", "ground_truth": "7"}
    found = with_pair(row, ["a", "b", "c", "d"], [0.5, 1.0, 0.1, 1.0], 0.1)
    assert found == {**row, "chosen": "b", "rejected": "c"}
    assert with_pair(row, ["a", "b"], [0.8, 0.7], 0.1) is None, "within the margin, whatever the rounding"


@pytest.fixture(scope="module")
def files(run_program, tmp_path_factory):
    """12 prompts with pairs, the same with groups of four, and 4 held-out ones with pairs."""
    folder = tmp_path_factory.mktemp("rows")
    equations.write_splits(folder)
    for name, split, count in (("train", "train", 12), ("val", "dev", 6)):
        rows = json.loads((folder / f"{split}.json").read_text())[:count]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, source, kind in (
        ("pairs", "train", "--pairs"),
        ("groups", "train", "--score"),
        ("held", "val", "--pairs"),
    ):
        args = (kind, "--n", 4, "--max_new_tokens", 32)
        out = folder / f"{name}.jsonl"
        done = run_program("-m", "gspo.sample", "embedded", folder / f"{source}.jsonl", out, *args)
        assert done.returncode == 0, done.stderr
        if kind == "--pairs":
            left_out = int(re.search(r"(\d+) have no pair", done.stdout)[1])
            assert len(out.read_text().splitlines()) + left_out == (12 if name == "pairs" else 6)
    return folder


def settings(files, kind, *more):
    return (f"data.train_files={files / kind}.jsonl", f"data.val_files={files}/held.jsonl", *FEW, *more)


@pytest.mark.slow
def test_what_sample_writes_is_scored_as_training_scores(files):
    for line in (files / "groups.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert len(row["responses"]) == len(row["rewards"]) == len(row["finish_reasons"]) == 4
        scored = [compute_score(row["data_source"], text, row["ground_truth"]) for text in row["responses"]]
        assert row["rewards"] == pytest.approx(scored)
    for line in (files / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["chosen"] != row["rejected"] and "responses" not in row and row["ground_truth"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs", "groups"])
def test_a_run_from_rows_learns_their_order_and_resumes_bit_for_bit(run_program, files, tmp_path, kind):
    """Four steps at once, and two and two."""
    config = ("--config", "configs/dpo.yaml" if kind == "pairs" else "configs/quick.yaml")
    args = (*config, *settings(files, kind, "optim.learning_rate=3e-3", "trainer.run_name=a"))
    args += ("optim.schedule=constant", "selfplay.rounds=1")  # which do not depend on the number of steps
    fixed = ("objective.anchor=initial", "reference.refresh=never")  # two steps planned end a round, four do not
    args += () if kind == "pairs" else ("rollout.source=rows", "data.test_files=[]", *fixed)
    said = finished(run_program, *args, f"trainer.output_dir={tmp_path / 'whole'}").stdout
    assert said.count("responses are read from the training rows") == 1
    half = f"trainer.output_dir={tmp_path / 'halves'}"
    finished(run_program, *args, half, "trainer.max_steps=2")
    assert "halves/a: 2 of 4 steps done" in finished(run_program, *args, half).stdout

    def saved(run):
        step = tmp_path / run / "a" / "checkpoints" / "step_000004"
        files = {"policy": step / "model.safetensors", "optimizer": step / "trainer" / "optimizer.safetensors"}
        return {name: load_file(file) for name, file in files.items()}

    metrics = [json.loads(line) for line in (tmp_path / "whole" / "a" / "metrics.jsonl").read_text().splitlines()]
    first, last = metrics[0], metrics[-1]
    assert last["pairs/gap_mean"] > 0 and last["preference_accuracy"] > 0.5 and last["heldout/gap_mean"] > 0
    assert first["pairs/gap_mean"] == pytest.approx(0.0, abs=1e-5)
    assert last["heldout/accuracy"] >= 0  # held-out rows have a ground truth: sampled for, too
    assert not {"reward_mean", "entropy", "mismatch", "tokens_per_second", "reward/batch_mean"} & last.keys()
    assert_equal_bits(saved("whole"), saved("halves"))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "more"), [(2, ()), (2, ("optim.micro_batch_responses=3",)), (3, ()), (4, ())])
def test_several_ranks_have_the_gradient_of_one(run_program, files, tmp_path, ranks, more):
    rows = (*settings(files, "pairs", *more), "objective.algorithm=dpo", "objective.anchor=initial")
    one, texts = gradient(run_program, tmp_path, 1, *rows)
    two, same = gradient(run_program, tmp_path, ranks, *rows)
    assert same == texts and len(texts) == 6
    for name in one:
        scale = one[name].abs().max()
        assert scale > 0 and (one[name] - two[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.slow
def test_what_cannot_be_learned_from_rows_is_said_before_training(run_program, files, tmp_path):
    for name, overrides, said in (
        ("a", ("objective.algorithm=dpo", "optim.minibatches=2"), "takes one optimizer step a batch"),
        ("b", ("rollout.source=rows", "data.train_files=embedded"), "row 1: the row has no responses to learn from"),
    ):
        args = ("--config", "configs/quick.yaml", *settings(files, "pairs"), *overrides)
        done = run_program("train.py", *args, f"trainer.output_dir={tmp_path / name}")
        assert done.returncode == 2 and said in done.stderr, done.stderr

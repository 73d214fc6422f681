"""The program from the outside: what it leaves, what it does not do twice, and how it says what is wrong."""

import json
import random
import subprocess

import pytest
import torch
from quick_run import SMALL, finished, rows, train_whole
from safetensors.torch import load_file

from gspo.algorithm.pairs import preferences
from gspo.config import Config, Objective
from gspo.embedded import equations
from gspo.types import Scores
from train import group_outcomes


@pytest.fixture(scope="module")
def uninterrupted(run_program, tmp_path_factory):
    return train_whole(run_program, tmp_path_factory.mktemp("whole"))


def test_what_a_run_leaves(uninterrupted):
    folder, printed = uninterrupted
    before, after = (json.loads((folder / f"eval_{x}.json").read_text()) for x in ("before", "after"))
    for report in (before, after):
        assert {"greedy", "pass@1", "reward_mean", "interval"} <= report.keys() and report["prompts"] == 4
        low, high = report["interval"]["pass@1"]
        assert low <= report["pass@1"] <= high
    assert f"{before['pass@1']:.3f}" in printed and f"{after['pass@1']:.3f}" in printed
    assert (folder.parent / "checkpoints").resolve() == (folder / "checkpoints").resolve()
    metrics = rows(folder / "metrics.jsonl")
    assert [m["round"] for m in metrics] == [0, 0, 0, 1, 1, 1]
    assert [("win_rate" in m) for m in metrics] == [False, False, True, False, False, True]
    assert metrics[0]["kl_divergence"] < 1e-9 < metrics[2]["kl_divergence"]
    assert metrics[3]["kl_divergence"] < 1e-9, "the opponent became the policy when the round began"
    assert all(m["mismatch"] < 1e-4 for m in metrics)
    from transformers import AutoModelForCausalLM

    step = folder / "checkpoints" / "step_000006"
    model = AutoModelForCausalLM.from_pretrained(step)
    assert type(model).__name__ == "LlamaForCausalLM"
    for name, tensor in load_file(step / "model.safetensors").items():
        assert model.state_dict()[name].equal(tensor)
    samples = rows(folder / "samples.jsonl")
    assert {s["step"] for s in samples} == set(range(1, 7))
    for s in samples:
        best, worst = max(s["rewards"]), min(s["rewards"])
        assert (s["chosen"] is not None) == (best - worst > 0.1 + 1e-6)
        if s["chosen"] is not None:
            assert s["rewards"][s["responses"].index(s["chosen"])] == best


def test_a_finished_run_is_not_run_again_and_can_be_extended(uninterrupted, run_program):
    folder, _ = uninterrupted
    stamp = (folder / "metrics.jsonl").stat().st_mtime_ns
    again = finished(run_program, *SMALL, f"trainer.output_dir={folder.parent}")
    assert "6 of 6 steps done" in again.stdout
    assert len(rows(folder / "metrics.jsonl")) == 6 and (folder / "metrics.jsonl").stat().st_mtime_ns >= stamp


def test_another_experiment_does_not_overwrite_the_first(uninterrupted, run_program):
    folder, _ = uninterrupted
    done = run_program("train.py", *SMALL, f"trainer.output_dir={folder.parent}", "trainer.seed=5")
    assert done.returncode == 2 and "trainer.seed = 0" in done.stderr and "Traceback" not in done.stderr
    assert len(rows(folder / "metrics.jsonl")) == 6


@pytest.mark.slow
def test_the_seeds_own_row_trains_for_a_step(run_program, tmp_path):
    data = tmp_path / "data.json"
    data.write_text('[{"prompt": "解方程：x + 5 = 12", "ground_truth": "7", "data_source": "math_reasoning"}]')
    finished(run_program, "--config", "configs/quick.yaml", f"data.train_files={data}", "trainer.max_steps=1",
             f"trainer.output_dir={tmp_path}", "rollout_n=8")  # fmt: skip
    (row,) = rows(tmp_path / "quick" / "metrics.jsonl")
    assert row["pairs/per_group"] > 0 and row["grad_norm"] > 0
    assert (tmp_path / "checkpoints" / "step_000001" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["reward_func={tmp}/bad.py"], "returned nan"),
        pytest.param(["data.train_files={tmp}/none.json"], "none.json", marks=pytest.mark.slow),
        pytest.param(["model.path={tmp}/nowhere"], "nowhere", marks=pytest.mark.slow),
        pytest.param(["data.max_prompt_length=3"], "data.max_prompt_length is 3", marks=pytest.mark.slow),
        pytest.param(["trainer.resume={tmp}"], "not a checkpoint", marks=pytest.mark.slow),
    ],
    ids=lambda x: x[0].split("=")[0] if isinstance(x, list) else "",
)
def test_a_users_mistake_is_one_paragraph_and_exit_code_2(run_program, tmp_path, overrides, says):
    (tmp_path / "bad.py").write_text("def compute_score(**kwargs):\n    return float('nan')\n")
    filled = [o.format(tmp=tmp_path) for o in overrides]
    done = run_program("train.py", *SMALL, f"trainer.output_dir={tmp_path}/out", *filled)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("step_*")) and not list(tmp_path.rglob("eval_*"))


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(uninterrupted, run_program, tmp_path):
    folder, _ = uninterrupted
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", str(folder / "checkpoints/step_000006"), str(other)], check=True)
    (other / "manifest.json").unlink()  # changed by hand, and not damaged
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    done = run_program("train.py", *SMALL, f"trainer.output_dir={tmp_path}/out", f"trainer.resume={other}")
    assert done.returncode == 2 and "another model: hidden_size is 64" in done.stderr


def test_evaluation_of_a_checkpoint_repeats_the_runs_table(uninterrupted, run_program, tmp_path):
    folder, _ = uninterrupted
    done = run_program("eval.py", folder.parent / "checkpoints", "--json", tmp_path / "e.json", "--compare",
                       folder / "checkpoints" / "step_000006", "--answers", tmp_path / "a.jsonl")  # fmt: skip
    assert done.returncode == 0, done.stderr
    mine, after = json.loads((tmp_path / "e.json").read_text()), json.loads((folder / "eval_after.json").read_text())
    assert {k: mine[k] for k in ("greedy", "pass@1", "reward_mean")} == {
        k: after[k] for k in ("greedy", "pass@1", "reward_mean")
    }
    assert mine["compare"]["win_rate"] == 0.5
    answers, of_run = rows(tmp_path / "a.jsonl"), rows(folder / "eval_after_answers.jsonl")
    assert [{"step": 6, **row} for row in answers] == of_run, "kept beside the report"
    assert [sum(row["correct"]) for row in of_run] == after["correct_counts"]
    assert sum(row["greedy"]["correct"][0] for row in of_run) / len(of_run) == after["greedy"]
    assert of_run[0]["model_input"].startswith("<|user|>") and len(of_run[0]["lengths"]) == 2
    assert rows(folder / "eval_before_answers.jsonl")[0]["step"] == 0


REWARDS = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.4], [0.9, 1, 1], [0.9, 1.0, 0.7], [0, 0, 1]])
ENDED = torch.ones_like(REWARDS, dtype=torch.bool)


@pytest.mark.parametrize(
    ("algorithm", "contrast"),
    [
        ("gspo", [0, 0, 0, 0, 1, 1]),  # a gap of exactly the margin is a tie
        ("online_dpo", [0, 0, 0, 0, 1, 1]),
        ("rloo", [0, 0, 1, 1, 1, 1]),  # policy gradients learn from every difference
        ("grpo", [0, 0, 1, 1, 1, 1]),
        ("spin", [1, 0, 1, 0, 1, 1]),  # the gold solution teaches most where all are wrong
    ],
)
def test_a_group_has_contrast_where_the_algorithm_learns_from_it(algorithm, contrast):
    cfg = Config(objective=Objective(algorithm=algorithm, margin=0.1))
    found, mean, best = group_outcomes(Scores(REWARDS), ENDED, cfg).T
    assert found.tolist() == contrast
    if algorithm == "gspo":
        assert found.bool().equal(preferences(REWARDS, 0.1).any((1, 2))), "exactly where there is a pair"
    assert (
        mean.tolist() == pytest.approx(REWARDS.mean(1).tolist()) and best.tolist() == REWARDS.double().amax(1).tolist()
    )


@pytest.mark.parametrize(("how", "contrast"), [("keep", [1, 0, 0]), ("lose", [1, 1, 0]), ("skip", [0, 0, 0])])
def test_contrast_is_what_is_left_after_cutoffs_are_dealt_with(how, contrast):
    """Two that ended and one that did not, worse than these; all right; none ended."""
    rewards, ended = (
        torch.tensor([[1.0, 1, 0], [1, 1, 1], [0, 0, 0]]),
        torch.tensor([[True, True, False]] * 2 + [[False] * 3]),
    )
    cfg = Config()
    cfg.rollout.on_cutoff = how
    found, mean, _ = group_outcomes(Scores(rewards), ended, cfg).T
    assert found.tolist() == contrast and mean.tolist() == pytest.approx([2 / 3, 1, 0]), "means are as scored"


def test_a_group_that_the_reward_function_failed_on_has_no_outcome():
    outcomes = group_outcomes(Scores(REWARDS, skipped=[1, 5]), ENDED, Config())
    assert outcomes.isnan().all(1).nonzero().flatten().tolist() == [1, 5]
    assert group_outcomes(Scores(REWARDS[:0]), ENDED[:0], Config()).shape == (0, 3), "a rank without prompts"


@pytest.mark.slow
def test_rewards_rise_although_some_gold_answers_are_wrong(run_program, tmp_path):
    """15 % of 128 rows, which no policy can get right: they are put off, as what is solved is."""
    equations.write_splits(tmp_path)
    data = json.loads((tmp_path / "train.json").read_text())[:128]
    for i in random.Random(0).sample(range(len(data)), 19):
        data[i]["ground_truth"] = "1234"
    (tmp_path / "train.json").write_text(json.dumps(data))
    finished(run_program, "--config", "configs/quick.yaml", f"data.train_files={tmp_path}/train.json",
             f"data.val_files={tmp_path}/dev.json", "data.train_batch_size=16", "trainer.max_steps=80", "eval.freq=40",
             "trainer.save_freq=0", "eval.before_and_after=false", "data.spaced=true",
             f"trainer.output_dir={tmp_path}")  # fmt: skip
    seen = rows(tmp_path / "quick" / "metrics.jsonl")
    eighths = [sum(row["reward_mean"] for row in seen[i : i + 10]) / 10 for i in range(0, 80, 10)]
    assert eighths[0] + 0.25 < eighths[-1] < 0.87, eighths
    assert min(b - a for a, b in zip(eighths, eighths[1:], strict=False)) > -0.03, eighths
    assert seen[-1]["data/put_off"] > 0.3 and seen[-1]["data/epoch"] > 5
    assert all(row["data/put_off"] > 0 or row["reward_mean"] == pytest.approx(row["reward/batch_mean"]) for row in seen)


@pytest.mark.slow
def test_an_alarm_may_end_the_run_and_the_same_command_does_not_creep_past_it(run_program, tmp_path):
    """The literal formula at a beta far too high: the pair gaps saturate at once."""
    sick = [*SMALL, f"trainer.output_dir={tmp_path}", "objective.anchor=none", "objective.preference_beta=5",
            "eval.before_and_after=false", "trainer.save_freq=0"]  # fmt: skip
    for _ in range(2):
        done = run_program("train.py", *sick, "health.on_alarm=stop")
        assert done.returncode == 2 and "error: stopped after step 2, with a checkpoint: pairs/gap_std" in done.stderr
    assert [row["step"] for row in rows(tmp_path / "quick" / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "quick" / "checkpoints" / "step_000002").is_dir()
    finished(run_program, *sick, "health.on_alarm=warn")
    assert len(rows(tmp_path / "quick" / "metrics.jsonl")) == 6


@pytest.mark.slow
def test_a_run_with_trees_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(run_program, tmp_path):
    """The places of branches follow from the last step's responses, which the checkpoint knows."""
    tree = (*SMALL[:2], "data.train_batch_size=6", "trainer.max_steps=4", "trainer.save_freq=2", "rollout.trunks=2",
            "eval.before_and_after=false", "eval.round_prompts=0", "rollout.n=6")  # fmt: skip
    finished(run_program, *tree, f"trainer.output_dir={tmp_path}")
    whole, checkpoint = tmp_path / "quick", tmp_path / "quick" / "checkpoints" / "step_000002"
    finished(run_program, *tree, f"trainer.output_dir={tmp_path / 'again'}", f"trainer.resume={checkpoint}")
    again = tmp_path / "again" / "quick"
    samples = [[row for row in rows(folder / "samples.jsonl") if row["step"] > 2] for folder in (whole, again)]
    assert samples[0] == samples[1] and len(samples[0]) == 12
    metrics = rows(whole / "metrics.jsonl")
    lengths = sum(row["response/length_mean"] * 36 for row in metrics)
    copied = sum(row["branches/copied"] * 24 for row in metrics)
    assert metrics[-1]["tokens_sampled"] == pytest.approx(lengths - copied) and copied > 0
    assert all(row["tokens_prefilled"] > 0 and 0 <= row["branches/without_place"] < 1 for row in metrics)

"""Runs of PPO: on two ranks as on one, and resumed bit for bit with critic and optimizer."""

import json
import math

import pytest
from quick_run import assert_equal_bits, finished
from ranks import gradient
from safetensors.torch import load_file

FEW = ("--config", "configs/ppo.yaml", "data.train_batch_size=6", "eval.before_and_after=false", "eval.round_prompts=0",
       "trainer.save_freq=2", "trainer.max_steps=4", "optim.schedule=constant")  # fmt: skip
CURVES = ("critic/loss", "critic/explained_variance", "critic/clip_share", "critic/grad_norm", "critic/value_mean")


@pytest.mark.slow
@pytest.mark.parametrize(("shared", "ranks"), [(False, 2), (True, 2), (False, 4)])
def test_several_ranks_have_the_gradients_of_one(run_program, tmp_path, shared, ranks):
    """The policy's and the critic's; seven groups, an uneven share; one response a forward."""
    ppo = ("objective.algorithm=ppo", "optim.minibatches=1", "optim.epochs_per_rollout=1", f"critic.shared={shared}",
           "objective.kl_in=reward", "objective.kl_coef=0.05", "optim.micro_batch_responses=3",
           "rollout.max_new_tokens=16")  # fmt: skip
    one, texts = gradient(run_program, tmp_path, 1, *ppo)
    two, same = gradient(run_program, tmp_path, ranks, *ppo)
    assert same == texts and one.keys() == two.keys()
    assert sum(name.startswith("critic.body") for name in one) == (0 if shared else (len(one) - 2) // 2)
    for name in one:
        scale = one[name].abs().max()
        assert scale > 0 and (one[name] - two[name]).abs().max() <= 2e-5 * scale, name


@pytest.mark.slow
@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_a_run_goes_on_bit_for_bit_with_its_critic(run_program, tmp_path, kl_in):
    """Four steps at once, and two and two."""
    args = (*FEW, f"objective.kl_in={kl_in}", "objective.kl_coef=0.05", "trainer.run_name=a")
    finished(run_program, *args, f"trainer.output_dir={tmp_path / 'whole'}")
    half = f"trainer.output_dir={tmp_path / 'halves'}"
    finished(run_program, *args, half, "trainer.max_steps=2")
    finished(run_program, *args, half)

    def saved(run):
        step = tmp_path / run / "a" / "checkpoints" / "step_000004"
        names = ("optimizer", "critic", "critic_optimizer")
        files = {name: step / "trainer" / f"{name}.safetensors" for name in names}
        return {name: load_file(file) for name, file in (files | {"policy": step / "model.safetensors"}).items()}

    whole = saved("whole")
    assert whole["critic"]["value.weight"].abs().max() > 0
    assert_equal_bits(whole, saved("halves"))
    metrics = [json.loads(line) for line in (tmp_path / "whole" / "a" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(metrics[-1][name]) for name in CURVES) and 0 <= metrics[-1]["clip_share"] < 1
    assert (metrics[-1]["loss/kl"] == 0) == (kl_in == "reward")

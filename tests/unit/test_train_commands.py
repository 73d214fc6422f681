"""Every command line of the original description, on the embedded model with few steps (`make test-slow`)."""

import json
import os
import subprocess

import pytest
import yaml
from repository import ROOT

FEW = ("trainer.max_steps=2", "data.train_batch_size=16", "eval.prompts=16", "eval.round_prompts=8", "eval.n=2",
       "rollout.max_new_tokens=24")  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]


def launch(tmp_path, *args, env=None, run="standard"):
    done = subprocess.run(
        ["./train.sh", *map(str, args), *FEW, f"trainer.output_dir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    rows = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2]
    written = len(list((tmp_path / "checkpoints" / "step_000002").glob("model*.safetensors")))
    assert written == (8 if "--n_gpus" in args else 1), "a file of weights from every process"
    return yaml.safe_load((tmp_path / run / "config.yaml").read_text()), rows


def test_no_arguments(tmp_path):
    cfg, _ = launch(tmp_path)
    assert cfg["rollout"]["n"] == 8 and cfg["selfplay"]["rounds"] == 3 and cfg["optim"]["learning_rate"] == 1e-6


def test_model_rollout_n_and_rounds(tmp_path):
    data = "data.train_files=embedded"  # the original's command names no data; ours asks for some, or for this
    cfg, rows = launch(tmp_path, "--model", "gspo/embedded/model", "--rollout_n", "10", "--self_play_rounds", "5", data)
    assert (cfg["model"]["path"], cfg["rollout"]["n"], cfg["selfplay"]["rounds"]) == ("gspo/embedded/model", 10, 5)


def test_the_original_description_by_name(tmp_path):
    cfg, _ = launch(tmp_path, "--config", "seed", run="seed")
    assert (cfg["objective"]["anchor"], cfg["objective"]["normalizer"]) == ("none", "batch")
    assert (cfg["rollout"]["n"], cfg["data"]["spaced"]) == (8, False)


def test_own_reward_function(tmp_path):
    (tmp_path / "my_reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': min(1.0, len(solution_str) / 40), 'length': len(solution_str)}\n"
    )
    _, rows = launch(tmp_path, "--reward_func", tmp_path / "my_reward.py")
    assert all(0 < r["reward_mean"] == pytest.approx(r["reward/length"] / 40, rel=0.2) for r in rows)


def test_environment_variables(tmp_path):
    names = {"ROLLOUT_N": "4", "SELF_PLAY_ROUNDS": "2", "PREFERENCE_BETA": "0.2", "MARGIN": "0.15",
             "USE_RANKING_LOSS": "false", "LEARNING_RATE": "2e-6", "TOTAL_EPOCHS": "7", "ROLLOUT_TEMPERATURE": "0.8",
             "TRAIN_BATCH_SIZE": "32"}  # fmt: skip
    cfg, _ = launch(tmp_path, env=names)
    assert (cfg["rollout"]["n"], cfg["rollout"]["temperature"], cfg["selfplay"]["rounds"]) == (4, 0.8, 2)
    o = cfg["objective"]
    assert (o["preference_beta"], o["margin"], o["use_ranking_loss"]) == (0.2, 0.15, False)
    assert (cfg["optim"]["learning_rate"], cfg["trainer"]["total_epochs"]) == (2e-6, 7)
    assert cfg["data"]["train_batch_size"] == 16, "an override on the command line wins"


@pytest.mark.parametrize("extra", [(), ("actor_rollout_ref.rollout.tensor_model_parallel_size=4",)], ids=["dp", "tp4"])
def test_eight_processes(tmp_path, extra):
    _, one = launch(tmp_path / "one")
    _, eight = launch(tmp_path / "eight", "--n_gpus", "8", *extra)
    assert [r["reward_mean"] for r in eight] == pytest.approx([r["reward_mean"] for r in one], abs=1e-6)
    assert [r["grad_norm"] for r in eight] == pytest.approx([r["grad_norm"] for r in one], rel=1e-4)


def test_offload_in_yaml(tmp_path):
    config = tmp_path / "standard.yaml"
    config.write_text("actor_rollout_ref:\n  ref:\n    fsdp_config:\n      param_offload: true\n")
    cfg, _ = launch(tmp_path, "--config", config)
    assert cfg["reference"]["param_offload"] is True

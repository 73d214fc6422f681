"""The main job on CUDA (`make test-gpu`); skipped where there is none."""

import json

import pytest
import torch
from architectures import tiny_model
from repository import PROGRAM_ENV

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_two_rounds_in_fp32_see_what_the_cpu_sees(run_program, tmp_path):
    """One GPU with the CPU-offloaded reference against no GPU: the first step's numbers, and a run to its end."""
    curves = []
    for name, devices in (("gpu", "0"), ("cpu", "")):
        done = run_program("train.py", "--config", "configs/quick.yaml", "trainer.max_steps=4", "model.precision=fp32",
                           "eval.prompts=16", f"trainer.output_dir={tmp_path}/{name}",
                           env={"CUDA_VISIBLE_DEVICES": devices})  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (tmp_path / name / "quick" / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line) for line in lines])
    gpu, cpu = curves
    assert gpu[0]["reward_mean"] == pytest.approx(cpu[0]["reward_mean"], abs=0.02)
    assert gpu[0]["grad_norm"] == pytest.approx(cpu[0]["grad_norm"], rel=0.1)
    assert all(step["mismatch"] < 1e-3 for step in gpu)
    assert gpu[2]["kl_divergence"] < 1e-5 < gpu[1]["kl_divergence"], "the opponent became the policy"


def test_an_offloaded_reference_leaves_the_gpu_between_uses(run_program, tmp_path):
    """Eight layers of 28 MiB: two at most are there at a time, with the activations of 134 tokens."""
    wide = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 8, "num_key_value_heads": 4}
    tiny_model("llama", **wide).save_pretrained(tmp_path)
    done = run_program("tests/programs/reference_memory.py", tmp_path / "told.json", tmp_path, env=PROGRAM_ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["shards_on"] == "cpu" and told["after"] == 0 and told["cuda_after"] < 2**20
    assert told["peak"] == told["left"] + told["largest"]
    assert told["largest"] <= told["cuda_peak"] <= 2 * told["largest"] + 2**25 < told["all"]

"""Run every example of docs/extending.md: each must train a step, read rows, log a step, or compute."""

import json
import re

import pytest
import torch
from architectures import tiny_model
from repository import ROOT
from tiny_sampler import prompts_of, sampler_for
from triton_programs import results

from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.engines import ENGINES

FEW = ("--config", "configs/quick.yaml", "trainer.max_steps=1", "data.train_batch_size=8", "eval.round_prompts=0",
       "eval.before_and_after=false", "model.precision=fp32")  # fmt: skip


def example(name):
    """The code block of the page whose first line is `# name`."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"```python\n(# {re.escape(name)}\n.*?)```", page, re.DOTALL)
    return code


def train_a_step(run_program, folder, code, *settings):
    """Run `code`, then a step of training with these settings, in a program of their own; return its metrics."""
    arguments = ["train.py", *FEW, *settings, f"trainer.output_dir={folder}"]
    done = run_program("-c", f"{code}\n\nimport sys, train\nsys.argv = {arguments}\ntrain.program()")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "quick" / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.slow
def test_a_reward_is_one_file(run_program, tmp_path):
    reward = tmp_path / "my_reward.py"
    reward.write_text(example("my_reward.py"))
    metrics = train_a_step(run_program, tmp_path, "", f"reward.path={reward}")
    assert 0.9 * metrics["reward/right"] <= metrics["reward_mean"] < metrics["reward/right"] < 1.0


def test_an_objective_is_one_function_and_one_line(run_program, tmp_path):
    code = "from gspo.algorithm.objective import *\nfrom gspo.algorithm.objective import Tensor, config\n"
    code += example("gspo/algorithm/objective.py")
    metrics = train_a_step(run_program, tmp_path, code, "objective.algorithm=best_only")
    assert metrics["loss/total"] > 0.0 and metrics["grad_norm"] > 0.0 and metrics["empty_updates"] == 0.0


@pytest.mark.slow
def test_a_data_source_is_one_class_and_one_line(run_program, tmp_path):
    file = tmp_path / "rows.tsv"
    file.write_text("prompt\tground_truth\n" + "".join(f"Solve: x + {i} = {2 * i}\t{i}\n" for i in range(2, 10)))
    code = example("gspo/data/tsv_file.py")
    train_a_step(run_program, tmp_path, code, f"data.train_files=[{file}]", "trainer.sample_rows=8")
    rows = [json.loads(line) for line in (tmp_path / "quick" / "samples.jsonl").read_text().splitlines()]
    assert {row["prompt"]: row["ground_truth"] for row in rows} == {
        f"Solve: x + {i} = {2 * i}": str(i) for i in range(2, 10)
    }


@pytest.mark.slow
def test_a_tracker_is_one_class_and_one_line(run_program, tmp_path):
    code = example("gspo/metrics/spreadsheet.py")
    metrics = train_a_step(run_program, tmp_path, code, "trainer.trackers=[metrics.csv]")
    (row,) = (tmp_path / "quick" / "metrics.csv").read_text().splitlines()
    assert [float(x) for x in row.split(",")] == [1, metrics["reward_mean"], metrics["kl_divergence"]]


def test_a_kernel_is_a_formula_a_file_and_a_line(tmp_path):
    for name in ("kl_rows.py", "kl_rows_triton.py"):
        (tmp_path / name).write_text(example(f"kernels/{name}"))
    assert results("interpreted_example.py", tmp_path, str(tmp_path)) < 1e-5


@pytest.mark.slow
def test_an_engine_is_one_class_and_one_line(monkeypatch, run_program, tmp_path):
    code = example("gspo/rollout/uncached.py")
    monkeypatch.setattr("gspo.rollout.engines.ENGINES", {**ENGINES})
    exec(compile(code, "docs/extending.md", "exec"), {})
    ours, theirs = (
        sampler_for(tiny_model("llama"), engine=engine).generate(prompts_of((3, 7)), 3, Sampling(1.2, max_new_tokens=9))
        for engine in ("paged", "uncached")
    )
    assert ours.tokens.equal(theirs.tokens) and ours.lengths.equal(theirs.lengths)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-4, atol=1e-5)
    metrics = train_a_step(run_program, tmp_path, code, "rollout.engine=uncached", "data.train_batch_size=2")
    assert metrics["mismatch"] < 1e-4 and metrics["tokens_sampled"] > 8

"""Training, sampling and evaluation on a CUDA device that is not there (device.py); part of `make test-slow`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import tiny_model
from quick_run import rows
from repository import PROGRAM_ENV, ROOT

pytestmark = pytest.mark.slow
REHEARSAL = ROOT / "tests" / "rehearsal"
RUN = "tests/rehearsal/run.py"
TINY = ("--config", "configs/quick.yaml", "model.precision=fp32", "data.train_batch_size=3", "rollout.n=3",
        "rollout.max_new_tokens=6", "eval.prompts=2", "eval.n=2", "eval.round_prompts=2", "reward.check_rows=0",
        "reward.workers=1", "reward.path=tests/rehearsal/reward.py", "trainer.save_freq=1", "optim.warmup_steps=0",
        "optim.epochs_per_rollout=1", "optim.minibatches=1", "optim.schedule=constant",
        "reference.param_offload=true")  # fmt: skip
TURING = {"REHEARSED_CAPABILITY": "7.5"}
PATHS = os.pathsep.join([PROGRAM_ENV["PYTHONPATH"], str(REHEARSAL)])


def checked(done):
    """What a program printed, once it has ended well."""
    assert done.returncode == 0, done.stdout[-1000:] + re.sub(r".*registered at.*\n", "", done.stderr)[-4000:]
    return done.stdout


def passed(run_program, file, chosen="", marked="gpu"):
    """Run tests of a file on the device; return how many passed."""
    command = (
        "-m",
        "pytest",
        "-n0",
        "-p",
        "plugin",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "-m",
        marked,
        "-k",
        chosen,
    )
    printed = checked(run_program(*command, file, env={"PYTHONPATH": PATHS}))
    return int(re.search(r"(\d+) passed", printed)[1])


def test_the_device_refuses_what_a_gpu_refuses(run_program):
    assert passed(run_program, "tests/rehearsal/device_cases.py", marked="not slow") >= 25


@pytest.fixture(scope="module")
def trained(run_program, tmp_path_factory):
    """Two steps on the device, with the offloaded reference, and the same two on the CPU -> the folders of both."""
    folders = []
    for name, program in (("gpu", (RUN, "train.py")), ("cpu", ("train.py",))):
        folder = tmp_path_factory.mktemp(name)
        checked(
            run_program(*program, *TINY, "trainer.max_steps=2", "selfplay.rounds=2", f"trainer.output_dir={folder}")
        )
        folders.append(folder / "quick")
    return folders


def test_a_training_step_on_the_device_is_that_of_the_cpu(trained):
    gpu, cpu = (rows(folder / "metrics.jsonl") for folder in trained)
    assert len(gpu) == len(cpu) == 2 and cpu[0]["pairs/per_group"] > 0
    for mine, theirs in zip(gpu, cpu, strict=True):
        for name in ("reward_mean", "grad_norm", "loss/total", "kl_divergence", "preference_accuracy", "entropy"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5, nan_ok=True), name
        assert mine["mismatch"] < 1e-5


def test_branches_on_the_device_begin_with_the_keys_of_their_trunks(run_program, tmp_path):
    tree = ("rollout.n=4", "rollout.trunks=2", "rollout.max_new_tokens=16", "trainer.max_steps=2")
    found = []
    for name, program in (("gpu", (RUN, "train.py")), ("cpu", ("train.py",))):
        checked(run_program(*program, *TINY, *tree, f"trainer.output_dir={tmp_path / name}"))
        names = ("tokens_sampled", "tokens_prefilled", "branches/copied", "reward_mean")
        found.append([[row[k] for k in names] for row in rows(tmp_path / name / "quick" / "metrics.jsonl")])
    assert found[0] == found[1] and all(prefilled == 24 and copied > 0 for _, prefilled, copied, _ in found[0])


@pytest.mark.parametrize("further", [(), ("optim.offload=true",)], ids=["on the GPU", "offloaded"])
def test_the_same_command_goes_on_from_the_checkpoint(run_program, trained, tmp_path, further):
    shutil.copytree(trained[0].parent, tmp_path, dirs_exist_ok=True)
    more = ("trainer.max_steps=3", "selfplay.rounds=2", f"trainer.output_dir={tmp_path}", *further)
    assert "2 of 3 steps done" in checked(run_program(RUN, "train.py", *TINY, *more))
    last = rows(tmp_path / "quick" / "metrics.jsonl")[-1]
    assert last["step"] == 3 and last["grad_norm"] > 0 and last["skipped_updates"] == 0


def test_several_optimizer_steps_in_bf16_with_checkpointing_and_another_algorithm(run_program, tmp_path):
    settings = ("model.precision=bf16", "model.gradient_checkpointing=true", "optim.epochs_per_rollout=2",
                "optim.micro_batch_tokens=40", "objective.anchor=initial", "rollout.top_p=0.9")  # fmt: skip
    checked(run_program(RUN, "train.py", *TINY, *settings, "trainer.max_steps=1", f"trainer.output_dir={tmp_path}"))
    assert rows(tmp_path / "quick" / "metrics.jsonl")[0]["grad_norm"] > 0


def test_a_checkpoint_is_evaluated_and_sampled_on_the_device(run_program, trained, tmp_path):
    checkpoint = trained[0] / "checkpoints" / "step_000002"
    out = tmp_path / "report.json"
    checked(run_program(RUN, "eval.py", checkpoint, "--limit", "2", "--n", "2", "--json", out))
    assert "greedy" in json.loads(out.read_text())
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "x + 5 = 12"}, {"prompt": "x = 3"}]))
    command = ("-m", "gspo.sample", checkpoint, tmp_path / "rows.json", tmp_path / "answers.jsonl")
    checked(run_program(RUN, *command, "--n", "3", "--max_new_tokens", "9", "--stop", "1"))
    assert [len(row["answers"]) for row in rows(tmp_path / "answers.jsonl")] == [3, 3]


# ---- the tests of tests/gpu that need no numbers of a card ----


@pytest.mark.parametrize(
    ("file", "chosen", "count"),
    [
        ("engine", "tokens_of_the_cpu and (llama or gemma2 or deepseek_v3 or mixtral)", 4),
        ("engine", "work_that_waits or sampler_and_trainer or agree_on_tokens or (recorded and float32)", 5),
        ("attention", "whole_models or proven", 9),
        ("pairwise", "takes_its_coefficients or beyond_the_kernel", 2),
        ("layers", "whole_models", 8),
    ],
    ids=["tokens", "graphs", "attention", "pairs", "layers"],
)
def test_tests_for_the_gpu_pass_on_the_device(run_program, file, chosen, count):
    assert passed(run_program, f"tests/gpu/test_{file}_on_cuda.py", chosen) == count


@pytest.mark.parametrize(
    ("family", "model", "products"),
    [("qwen2", "Qwen2.5-0.5B", 137_500), ("qwen3", "Qwen3-0.6B", 135_200)],
    ids=["biases", "norms of queries and keys"],
)
def test_a_layer_takes_no_more_launches_and_bytes_than_the_page_says(run_program, family, model, products):
    """Launches in a decoding step; bytes a token in a training step, those of attention left out."""
    page = (ROOT / "docs" / "gpu.md").read_text()
    launches, kilobytes = map(int, re.search(rf"\| {model}, now \| (\d+) \| (\d+) \|", page).groups())
    told = json.loads(checked(run_program("tests/rehearsal/count_work.py", family, env={"PYTHONPATH": PATHS})))[family]
    assert sum(told["launches"].values()) <= launches, told["launches"]
    assert sum(told["bytes"]["elementwise"].values()) <= 1000 * kilobytes + 500, told["bytes"]["elementwise"]
    assert sum(told["bytes"]["products"].values()) <= products, told["bytes"]["products"]


def test_turing_samples_the_tokens_of_the_cpu_by_pytorchs_attention(run_program):
    command = ("-m", "pytest", "-n0", "-p", "plugin", "-m", "gpu", "-s", "-k", "tokens_of_the_cpu and llama")
    done = run_program(*command, "tests/gpu/test_engine_on_cuda.py", env={"PYTHONPATH": PATHS} | TURING)
    checked(done)
    assert "1 passed" in done.stdout and "older than Ampere" in done.stderr


def test_more_processes_than_gpus_end_with_one_line(run_program, tmp_path):
    start = ("gspo/distributed/start_ranks.py", "--standalone", "--nproc_per_node=3")
    done = run_program(*start, RUN, "train.py", *TINY, f"trainer.output_dir={tmp_path}")
    assert done.returncode == 2 and done.stderr.count("error:") == 1, done.stderr
    assert "3 processes were started on this machine, and it has 1 GPU that" in done.stderr
    assert not (tmp_path / "quick").exists()


def test_the_program_that_measures_an_offloaded_reference_runs(run_program, tmp_path):
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path)
    told = tmp_path / "told.json"
    checked(run_program(RUN, "tests/programs/reference_memory.py", told, tmp_path, env=PROGRAM_ENV))
    assert json.loads(told.read_text())["shards_on"] == "cpu"


@pytest.mark.timeout(1500)
def test_the_day_on_a_gpu_runs_to_its_end(tmp_path):
    tiny = {"PYTHON": f"{sys.executable} {RUN}", "TINY": "1", "PATIENCE": "20"}
    subprocess.run(
        ["bash", "benchmarks/gpu_day.sh", tmp_path], cwd=ROOT, env=os.environ | tiny, check=True, timeout=1400
    )
    day = json.loads((tmp_path / "gpu_day.json").read_text())
    logs = {p["name"]: (tmp_path / f"{p['name']}.log") for p in day["parts"] if p["exit_code"]}
    assert not logs, {name: log.read_text()[-2000:] if log.exists() else "" for name, log in logs.items()}
    assert {name for found in day["results"]["decode"] for name in found} >= {"slots", "step_ms"}
    assert list(day["tests"]["tests-pairwise"].values()) == ["PASSED"]
    assert [step["step"] for step in day["runs"]["smoke"]["steps"]] == [1, 2, 3, 4], "it went on"
    assert day["runs"]["step-offloaded"]["steps"] and day["runs"]["step-resident"]["forecast_gib"] > 0
    assert "| decode |" in (tmp_path / "gpu.md").read_text()


def test_gpu_tests_have_a_process_for_each_file():
    """After an assert on the device every further call of a process fails."""
    recipe = re.search(r"^test-gpu:.*\n((?:\t.*\n)+)", Path(ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert "for file in tests/gpu/test_*.py" in recipe and "-m gpu $$file" in recipe

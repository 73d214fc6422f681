"""The program from the outside: it resumes bit for bit, survives SIGKILL, and says what is wrong in one paragraph."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from processes import Program, wait_until
from repository import ROOT
from safetensors.torch import load_file

SMALL = ("--config", "configs/quick.yaml", "data.train_batch_size=6", "trainer.max_steps=6", "trainer.save_freq=2",
         "eval.prompts=4", "eval.round_prompts=4", "eval.n=2")  # fmt: skip


@pytest.fixture()
def start():
    """Start train.py ARGS; what a failed test has left running is killed."""
    started = []

    def run(*args):
        command = [sys.executable, "train.py", *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def finished(run_program, *args):
    done = run_program("train.py", *args)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def final(folder):
    step = folder / "checkpoints" / "step_000006"
    return {
        "policy": load_file(step / "model.safetensors"),
        "optimizer": load_file(step / "trainer" / "optimizer.safetensors"),
        "opponent": load_file(step / "trainer" / "opponent.safetensors"),
    }


def assert_equal_bits(a, b):
    for part in a:
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), (part, name)


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = subprocess.run(
        [sys.executable, "train.py", *SMALL, f"trainer.output_dir={folder}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "quick", done.stdout


def test_a_run_killed_in_the_middle_ends_bit_for_bit_the_same(uninterrupted, run_program, tmp_path):
    """Killed while it saves, in the second round, when the opponent is no longer the initial model."""
    whole, _ = uninterrupted
    program = Program("train.py", *SMALL, f"trainer.output_dir={tmp_path}", log=tmp_path / "log")
    step = tmp_path / "quick" / "checkpoints" / "step_000004"
    saving = step.with_name("step_000004.part")
    assert wait_until(lambda: any(saving.glob("*.safetensors")) or step.exists(), every_s=0.0005)
    program.kill(program.process.pid)
    assert program.orphans() == {}, "nor the processes of the reward function"
    assert not (tmp_path / "quick/checkpoints/step_000006").exists(), "killed too late to test anything"
    done = finished(run_program, *SMALL, f"trainer.output_dir={tmp_path}")
    assert "of 6 steps done" in done.stdout
    assert_equal_bits(final(tmp_path / "quick"), final(whole))
    keys = ("step", "reward_mean", "kl_divergence", "loss/total", "grad_norm", "round")
    curves = [[{k: r[k] for k in keys} for r in rows(f / "metrics.jsonl")] for f in (whole, tmp_path / "quick")]
    assert curves[0] == curves[1] and [r["step"] for r in curves[0]] == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.rglob("*.part"))


def test_a_run_that_is_asked_to_leave_ends_its_step_saves_and_goes_on_later_bit_for_bit(
    uninterrupted, run_program, start, tmp_path
):
    """SIGUSR1, as slurm sends before time is up;."""
    whole, _ = uninterrupted
    few = [*SMALL, "trainer.save_freq=0", f"trainer.output_dir={tmp_path}"]
    process = start(*few)
    assert wait_until((tmp_path / "quick/metrics.jsonl").exists)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and err == "" and "SIGUSR1: left after step" in out.splitlines()[-1]
    step = len(rows(tmp_path / "quick/metrics.jsonl"))
    assert step < 6 and (tmp_path / f"quick/checkpoints/step_{step:06d}").exists()
    done = finished(run_program, *few)
    assert f"{step} of 6 steps done" in done.stdout
    assert_equal_bits(final(tmp_path / "quick"), final(whole))


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
        (["data.train_files={tmp}/none.json"], "none.json"),
        (["model.path={tmp}/nowhere"], "nowhere"),
        (["reward_func={tmp}/bad.py"], "returned nan"),
        (["data.max_prompt_length=3"], "data.max_prompt_length is 3"),
        (["trainer.resume={tmp}"], "not a checkpoint"),
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
                       folder / "checkpoints" / "step_000006")  # fmt: skip
    assert done.returncode == 0, done.stderr
    mine, after = json.loads((tmp_path / "e.json").read_text()), json.loads((folder / "eval_after.json").read_text())
    assert {k: mine[k] for k in ("greedy", "pass@1", "reward_mean")} == {
        k: after[k] for k in ("greedy", "pass@1", "reward_mean")
    }
    assert mine["compare"]["win_rate"] == 0.5


def test_interrupt_leaves_nothing_half_written(start, tmp_path):
    process = start(*SMALL, f"trainer.output_dir={tmp_path}", "trainer.max_steps=1000")
    deadline = time.monotonic() + 200
    while not (tmp_path / "quick/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert not list((tmp_path / "quick" / "checkpoints").glob("*.part"))
    assert os.path.exists(tmp_path / "quick" / "config.yaml")


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

"""A run that is killed, asked to leave or interrupted loses nothing, and goes on bit for bit."""

import os
import signal
import subprocess
import sys

import pytest
from processes import Program, wait_until
from quick_run import SMALL, assert_equal_bits, final, finished, rows, train_whole
from repository import ROOT
from safetensors.torch import load_file


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


@pytest.fixture(scope="module")
def uninterrupted(run_program, tmp_path_factory):
    return train_whole(run_program, tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_of_an_adapter_killed_in_its_second_round_ends_bit_for_bit_the_same(run_program, tmp_path):
    pytest.importorskip("peft")
    small = (*SMALL, "model.lora={rank: 4}", "optim.learning_rate=3e-3", "eval.before_and_after=false")
    finished(run_program, *small, f"trainer.output_dir={tmp_path / 'whole'}")
    program = Program("train.py", *small, f"trainer.output_dir={tmp_path}", log=tmp_path / "log")
    assert wait_until((tmp_path / "quick/checkpoints/step_000004").exists, every_s=0.0005)
    program.kill(program.process.pid)
    assert not (tmp_path / "quick/checkpoints/step_000006").exists(), "killed too late to test anything"
    assert "of 6 steps done" in finished(run_program, *small, f"trainer.output_dir={tmp_path}").stdout
    found, expected = (final(folder / "quick") for folder in (tmp_path, tmp_path / "whole"))
    assert_equal_bits(found, expected)
    inside = tmp_path / "whole/quick/checkpoints/step_000004"  # of a round; with its last step the next would begin
    policy, opponent = (load_file(inside / f"{name}.safetensors") for name in ("adapter_model", "trainer/opponent"))
    assert policy.keys() == opponent.keys() and not all(opponent[name].equal(x) for name, x in policy.items())


@pytest.mark.slow
def test_a_run_that_is_asked_to_leave_ends_its_step_saves_and_goes_on_later_bit_for_bit(
    uninterrupted, run_program, start, tmp_path
):
    """SIGUSR1, as slurm sends it before time is up."""
    whole, _ = uninterrupted
    few = [*SMALL, "trainer.save_freq=0", f"trainer.output_dir={tmp_path}"]
    process = start(*few)
    assert wait_until((tmp_path / "quick/metrics.jsonl").exists)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and err == "" and "SIGUSR1: left after step" in out.splitlines()[-1]
    step = len(rows(tmp_path / "quick/metrics.jsonl"))
    assert step < 6 and (tmp_path / f"quick/checkpoints/step_{step:06d}").exists()
    done = finished(run_program, *few)
    assert f"{step} of 6 steps done" in done.stdout
    assert_equal_bits(final(tmp_path / "quick"), final(whole))


@pytest.mark.slow
def test_interrupt_leaves_nothing_half_written(start, tmp_path):
    process = start(*SMALL, f"trainer.output_dir={tmp_path}", "trainer.max_steps=1000")
    assert wait_until((tmp_path / "quick/metrics.jsonl").exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130 and "Traceback" not in err
    assert not list((tmp_path / "quick" / "checkpoints").glob("*.part"))
    assert os.path.exists(tmp_path / "quick" / "config.yaml")

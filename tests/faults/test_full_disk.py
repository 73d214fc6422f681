"""A disk that is full costs a checkpoint and nothing else."""

import contextlib
import json
import subprocess

import pytest
from processes import Program, wait_until
from saved_run import ALONE, a_run, no_file_above

from gspo.checkpoint import manifest
from gspo.checkpoint.find_runs import latest_checkpoint
from gspo.errors import UserError


@pytest.fixture()
def run(tmp_path, tokenizer):
    return a_run(tmp_path, tokenizer)


def test_a_full_disk_costs_one_checkpoint_with_a_warning_and_the_next_succeeds(run, capsys):
    run.save(2)
    capsys.readouterr()
    with no_file_above(100_000):
        run.save(4)
        (warning,) = capsys.readouterr().out.splitlines()
        assert warning.startswith("warning: the checkpoint of step 4 could not be written (File too large")
        assert warning.endswith("training goes on, the latest checkpoint is step_000002.")
        assert run.names() == ["step_000002"]
        with pytest.raises(UserError, match=r"step 4 is done.*goes on from step_000002"):
            run.checkpoints.require(4)
    saved = run.save(4)
    assert manifest.find_damage(saved, ALONE) == "" and capsys.readouterr().out == f"checkpoint {saved}\n"
    run.checkpoints.require(4)


def test_a_disk_too_full_for_the_tokenizer_costs_one_checkpoint_with_a_warning(run, capsys):
    """What transformers and tokenizers write raises errors of other kinds."""
    with no_file_above(1_000):
        run.save(2)
    assert "training goes on, the latest checkpoint is none yet" in capsys.readouterr().out
    run.save(4)
    assert run.names() == ["step_000004"]


@pytest.fixture()
def small_disk(tmp_path, request):
    """A file system of so many MB; one checkpoint has 10.4."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}m", "tmpfs", disk]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"may not mount a tmpfs: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("small_disk", [12], indirect=True)
def test_a_disk_that_is_really_full(small_disk, tokenizer, capsys):
    run = a_run(small_disk, tokenizer, "trainer.keep_last=1")
    (small_disk / "other").write_bytes(bytes(4 << 20))
    run.save(2)
    (warning,) = capsys.readouterr().out.splitlines()
    assert "No space left on device" in warning and run.names() == []
    (small_disk / "other").unlink()
    assert manifest.find_damage(run.save(4), ALONE) == "" and run.names() == ["step_000004"]
    run.save(6)  # the one before is removed only when this one is whole
    assert "No space left on device" in capsys.readouterr().out and run.names() == ["step_000004"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("small_disk", [24], indirect=True)
def test_a_run_goes_on_when_its_disk_is_full_and_loses_nothing_but_a_checkpoint(small_disk, tmp_path):
    """From the outside: the disk fills up after a few steps, and is emptied when the run has complained."""
    program = Program(
        "train.py", "--config", "configs/quick.yaml", "data.train_batch_size=4", "trainer.max_steps=40",
        "trainer.save_freq=2", "trainer.keep_last=1", "trainer.keep_best=false", "eval.before_and_after=false",
        "eval.round_prompts=0", "reward.check_rows=0", f"trainer.output_dir={small_disk}", log=tmp_path / "log",
    )  # fmt: skip
    run = small_disk / "quick"
    said = lambda: (tmp_path / "log").read_text()  # noqa: E731
    assert wait_until(lambda: (run / "checkpoints" / "step_000002").exists())
    with contextlib.suppress(OSError):
        (small_disk / "other").write_bytes(bytes(24 << 20))
    assert wait_until(lambda: "could not be written" in said() and "they wait in memory" in said())
    assert latest_checkpoint(run / "checkpoints") is not None and program.process.poll() is None
    (small_disk / "other").unlink()
    assert program.ended() == 0, said()[-3000:]
    assert "No space left on device" in said() and "are written again, none is missing" in said()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [*range(1, 41)]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000040"]
    assert manifest.find_damage(run / "checkpoints" / "step_000040", ALONE) == ""

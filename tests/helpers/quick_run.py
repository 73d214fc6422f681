"""A run of six steps in two rounds, as test_train.py and the tests of faults start it, and what it leaves."""

import json

import torch
from safetensors.torch import load_file

SMALL = ("--config", "configs/quick.yaml", "data.train_batch_size=6", "trainer.max_steps=6", "trainer.save_freq=2",
         "eval.prompts=4", "eval.round_prompts=4", "eval.n=2")  # fmt: skip


def finished(run_program, *args):
    done = run_program("train.py", *args)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def final(folder):
    step = folder / "checkpoints" / "step_000006"
    adapter = step / "adapter_model.safetensors"  # of a run with model.lora
    return {
        "policy": load_file(adapter if adapter.exists() else step / "model.safetensors"),
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


def train_whole(run_program, folder):
    """The run that nothing interrupts -> its folder, and what it printed."""
    return folder / "quick", finished(run_program, *SMALL, f"trainer.output_dir={folder}").stdout

"""Start a program under torchrun, or alone, and read the gradient of one step from it."""

import json

from repository import PROGRAM_ENV
from safetensors.torch import load_file

FEW = ("data.train_batch_size=7", "optim.grad_clip=1e9")


def launch(run_program, ranks, program, *args, env=None, timeout=600):
    done = run_program(
        "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", program, *args, timeout=timeout,
        env=env or PROGRAM_ENV,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def gradient(run_program, folder, ranks, *overrides):
    out = folder / f"{ranks}.safetensors"
    if ranks == 1:
        done = run_program("tests/programs/one_gradient.py", out, *FEW, *overrides, env=PROGRAM_ENV)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        launch(run_program, ranks, "tests/programs/one_gradient.py", out, *FEW, *overrides)
    return load_file(out), json.loads(out.with_suffix(".json").read_text())

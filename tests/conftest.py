"""Shared by the tests: the embedded model, tiny random architectures, and a way to run programs."""

import os
import signal
import subprocess
import sys

# Before torch is imported. The products of these tests are small: a second thread would wait more than it computes, and
# two test processes have use for two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No test takes another path because a measurement came out otherwise; those of the choice ask for one themselves.
os.environ.setdefault("GSPO_NATIVE", "1")
os.environ["GSPO_LANG"] = "en"  # of the messages that tests look for

import hypothesis
import pytest
import torch
from repository import ROOT

# No example fails for being slow on a busy machine, and every run tries the same ones; the fuzz targets draw new ones.
hypothesis.settings.register_profile("the same everywhere", deadline=None, derandomize=True)
hypothesis.settings.load_profile("the same everywhere")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job behind `&` ignores Ctrl-C, and so would its children


@pytest.fixture(scope="session")
def tokenizer():
    from gspo.models.loading import load_tokenizer

    return load_tokenizer(None)


@pytest.fixture()
def embedded_model():
    from gspo.models.loading import load_model

    return load_model(None)


@pytest.fixture(params=["compiled", "PyTorch's"])
def kernels(request, monkeypatch):
    """With the CPU's compiled kernels, and without."""
    from gspo.kernels import native

    if request.param == "PyTorch's":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C++ compiler here")


@pytest.fixture(scope="session")
def run_program():
    """Run `python ARGS` from the repository; returns the finished process."""

    def run(*args, timeout=600, env=None):
        return subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **(env or {})},
        )

    return run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_survives():
    """A test that fails leaves no program of its own running."""
    from processes import Program

    yield
    for program in Program.started:
        for pid in program.alive():
            program.kill(pid)
        program.process.wait()
    Program.started.clear()


@pytest.fixture
def poisoned():
    """Memory nobody wrote is NaN."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

"""Shared by the tests: the embedded model, tiny random architectures, and a way to run programs."""

import faulthandler
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
from processes import STACKS, abort, new_mark
from repository import ROOT

# No example fails for being slow on a busy machine, and every run tries the same ones; the fuzz targets draw new ones.
hypothesis.settings.register_profile("the same everywhere", deadline=None, derandomize=True)
hypothesis.settings.load_profile("the same everywhere")

GRACE_S = 60  # for pytest-timeout to come first
REAL_STDERR = pytest.StashKey[int]()

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
    """Run `python ARGS` from the repository; returns the finished process. One that hangs shows where."""

    def run(*args, timeout=600, env=None):
        command, mark = [sys.executable, *map(str, args)], new_mark()
        environment = {**os.environ, **STACKS, **(env or {}), "GSPO_TEST_MARK": mark}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
            try:
                said = process.communicate(timeout=timeout)
            except BaseException as e:
                told = abort(mark)
                if not isinstance(e, subprocess.TimeoutExpired):
                    raise
                out, err = process.communicate(timeout=60)
                raise AssertionError(f"hangs after {timeout} s:\n{told}\n{out[-3000:]}\n{err[-20_000:]}") from e
        return subprocess.CompletedProcess(command, process.returncode, *said)

    return run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_configure(config):
    config.stash[REAL_STDERR] = os.dup(2)  # while nothing is captured


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """End a test that hangs where pytest-timeout cannot: in compiled code, which runs no handler of a signal.

    All threads' stacks go to the real stderr, the process ends, and the test counts as failed by a crash.
    """
    limit = item.get_closest_marker("timeout")
    seconds = limit.args[0] if limit else float(item.config.getini("timeout"))
    faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True, file=item.config.stash[REAL_STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


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

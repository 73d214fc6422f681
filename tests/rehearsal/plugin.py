"""A pytest plugin: tests run with the device that is not there, and so do the programs they start.

PYTHONPATH=.:tests/rehearsal python -m pytest -n0 -p plugin -m gpu tests/gpu/test_engine_on_cuda.py
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import install

import gspo  # noqa: F401 -- before torch

RUN = str(Path(__file__).with_name("run.py"))
_run = subprocess.run


def run(command: list[str], *args: Any, **kwargs: Any) -> Any:
    """Start a program of a test with the device, too."""
    if command[0] == sys.executable and Path(command[1]).suffix == ".py":
        command = [command[0], RUN, *command[1:]]
    return _run(command, *args, **kwargs)


install.install()
subprocess.run = run

"""Run a program of tests/programs/ whose kernels Triton interprets."""

import json
import os
import subprocess
import sys
from pathlib import Path

from repository import PROGRAM_ENV, PROGRAMS


def results(program: str, folder: Path, *arguments: str) -> dict:
    """What a program prints last. It gets a compiler cache of its own.

    Kernels run in Triton's interpreter, which has to be known before anything imports Triton.
    """
    env = os.environ | {**PROGRAM_ENV, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, PROGRAMS / program, *arguments], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

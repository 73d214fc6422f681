"""The Triton kernels without a GPU: their arithmetic in Triton's interpreter, and what the compiler makes of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")
HERE = Path(__file__).parent


def results(program: str, folder: Path) -> dict:
    """What a program of this folder prints last. It gets a compiler cache of its own.

    Where its name says so, kernels run in Triton's interpreter, which has to be known before anything imports Triton.
    """
    env = os.environ | {"TRITON_INTERPRET": "1" if program.startswith("interpreted") else "0"}
    env |= {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run([sys.executable, HERE / program], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_interpreted_kernels_are_as_near_to_float64_as_plain_pytorch(tmp_path):
    """Several chunks of several blocks, no chunk a multiple of the block; unwritten memory is NaN."""
    found = results("interpreted_kernels.py", tmp_path)
    wrong = [line for lines in found.values() for line in lines]
    assert len(found) == 24 and not wrong, "\n".join(wrong)


def test_kernels_compile_for_sm_80_and_sm_90a_with_nothing_spilled_and_wide_loads(tmp_path):
    found = results("compiled_kernels.py", tmp_path)
    assert len(found) == 32
    for name, said in found.items():
        assert said["spilled"] == 0 and said["registers"] <= 64, (name, said)
        assert said["wide"] == (2 if "bf16" in name else 4), (name, said)  # 16 elements a thread, 16 bytes a load

"""Products in bfloat16 by each instruction set that this processor has: oneDNN computes them by different code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

NEEDED = {  # a value of ONEDNN_MAX_CPU_ISA, and what the processor must have for it
    "AVX2": "avx2",
    "AVX512_CORE": "avx512bw",
    "AVX512_CORE_BF16": "avx512_bf16",
    "AVX512_CORE_AMX": "amx_bf16",
}


def instruction_sets():
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # macOS has one
        return []
    return [name for name, flag in NEEDED.items() if flag in flags]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", instruction_sets())
def test_bfloat16_by_each_instruction_set(name):
    """The tests marked `bf16`, in a process of their own: oneDNN reads the limit once."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "bf16", "tests"],
        cwd=ROOT,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": name, "OMP_NUM_THREADS": "1"},  # small products
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]

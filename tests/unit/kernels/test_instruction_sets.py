"""Computing by each instruction set: oneDNN's and ours of this processor, and our kernels on another one, emulated."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import emulated_kernels
import pytest
from repository import PROGRAM_ENV, ROOT

from gspo.kernels import native

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


def run_kernel_tests(*arguments, **environment):
    """Run the tests of the compiled kernels in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", *arguments, "tests/unit/kernels/test_cpu_kernels.py"],
        cwd=ROOT,
        env=os.environ | PROGRAM_ENV | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("without, needed", [("-mno-avx512f", "avx2"), ("-mno-avx", "sse2")])
def test_kernels_without_newer_instructions(without, needed, tmp_path):
    """As older processors compute them: eight numbers at a time, or four, and pairs in bfloat16 by two products."""
    if platform.machine() != "x86_64" or needed not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"this processor has no {needed}")
    if not (compiler := shutil.which("g++")):
        pytest.skip("no g++ here")
    run_kernel_tests(CXX=f"{compiler} {without}", XDG_CACHE_HOME=str(tmp_path))
    assert list((tmp_path / "gspo").glob("kernels-*.so")), "compiled for them"


ARM = {  # flags that stand for those of -mcpu=native on such a processor
    "any processor, NEON": "-march=armv8-a",
    "with products of bfloat16 pairs": "-march=armv8.6-a",
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("march", ARM.values(), ids=ARM)
def test_kernels_on_arm(march, tmp_path):
    """All compiled for 64-bit ARM with the flags that native.py has there, and called under an emulator."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user (`apt-get install` has both on Debian and Ubuntu)")
    flags = [march if flag == "-mcpu=native" else flag for flag in native.flags("aarch64")]
    assert march in flags
    program = emulated_kernels.build([compiler], flags, tmp_path)
    command = f"{emulator} -cpu max {program}"
    run_kernel_tests("-p", "emulated_kernels", "-k", "not as_often_as_softmax", GSPO_EMULATED=command)

"""Freed memory stays in a training process, with glibc and without malloc settings in the environment."""

import platform

import pytest

TENSOR_MIB = 256
LOOK = f"""
import torch
from gspo.system.malloc import keep_freed_memory

def resident():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) / 1024

keep_freed_memory()
before = resident()
torch.ones({TENSOR_MIB} * 2**18)  # freed at once
print(resident() - before)
"""
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


def kept_mib(run_program, **environment):
    """By how much a process is larger after a tensor that it has freed."""
    done = run_program("-c", LOOK, env=environment)
    assert done.returncode == 0, done.stderr[-1000:]
    return float(done.stdout)


@needs_glibc
def test_the_memory_of_a_freed_tensor_stays_in_the_process(run_program):
    assert kept_mib(run_program) > 0.9 * TENSOR_MIB


@needs_glibc
@pytest.mark.parametrize("said", [{"MALLOC_TOP_PAD_": "4096"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=4096"}])
def test_settings_of_the_environment_are_left_alone(run_program, said):
    assert kept_mib(run_program, **said) < 0.1 * TENSOR_MIB

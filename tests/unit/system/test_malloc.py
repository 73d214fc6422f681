"""Freed memory stays in a training process, with glibc and without malloc settings, until it is returned."""

import platform

import pytest

TENSOR_MIB = 256
LOOK = f"""
import torch
from gspo.system.malloc import keep_freed_memory, return_freed_memory

def resident():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) / 1024

keep_freed_memory()
before = resident()
torch.ones({TENSOR_MIB} * 2**18)  # freed at once
print(resident() - before)
return_freed_memory()
print(resident() - before)
"""
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


def kept_mib(run_program, **environment):
    """By how much a process is larger after a tensor that it has freed, and after freed memory was returned."""
    done = run_program("-c", LOOK, env=environment)
    assert done.returncode == 0, done.stderr[-1000:]
    return [float(line) for line in done.stdout.split()]


@needs_glibc
def test_the_memory_of_a_freed_tensor_stays_in_the_process(run_program):
    kept, returned = kept_mib(run_program)
    assert kept > 0.9 * TENSOR_MIB
    assert returned < 0.1 * TENSOR_MIB


@needs_glibc
@pytest.mark.parametrize("said", [{"MALLOC_TOP_PAD_": "4096"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=4096"}])
def test_settings_of_the_environment_are_left_alone(run_program, said):
    assert kept_mib(run_program, **said)[0] < 0.1 * TENSOR_MIB

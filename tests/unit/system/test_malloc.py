"""Freed memory stays with a training process, where the C library is glibc and nobody has said otherwise."""

import os
import platform

import pytest
from repository import PROGRAM_ENV

LOOK = """
import resource
import torch
from gspo.system.malloc import keep_freed_memory

keep_freed_memory()
before = []
for _ in range(12):  # small pieces that alignment leaves over are kept apart at first, seven of a size
    before.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    torch.ones(2**24)
before.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(*(b - a for a, b in zip(before, before[1:])))
"""
PAGES = 2**26 // os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_tensor_gets_the_pages_of_the_one_before(run_program):
    kept = run_program("-c", LOOK, env=PROGRAM_ENV)
    first, *_, last = map(int, kept.stdout.split())
    assert first > 0.9 * PAGES and last < 0.01 * PAGES, kept.stderr[-1000:]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("said", [{"MALLOC_TOP_PAD_": "4096"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=4096"}])
def test_settings_of_the_environment_are_left_alone(run_program, said):
    faults = run_program("-c", LOOK, env={**PROGRAM_ENV, **said})
    assert min(map(int, faults.stdout.split())) > 0.9 * PAGES, faults.stderr[-1000:]

"""How many of a machine's cores a rank uses."""

import os
import subprocess
import sys

import pytest
from repository import PROGRAM_ENV

from gspo.system.torchrun import cores_of

NODES = [set(range(8)), set(range(8, 16))]
MACHINE = NODES[0] | NODES[1]


@pytest.mark.parametrize(
    "own, ranks, cores",
    [
        (MACHINE, 1, 16),
        (MACHINE, 2, 8),
        (MACHINE, 3, 5),
        (MACHINE, 32, 1),
        (NODES[0], 2, 8),
        (NODES[1], 2, 8),
        ({3}, 2, 1),
    ],
)
def test_a_rank_that_is_bound_has_its_cores_for_itself_and_others_share(own, ranks, cores):
    assert cores_of(own, MACHINE, ranks) == cores


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_run_reads_its_own_cores_and_its_parents():
    """Two ranks of two cores compute with one thread each; bound to one core each, too, not with none."""
    ask = "from gspo.system.torchrun import cpu_cores; print(cpu_cores())"
    bind = "import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]);"
    environment = os.environ | PROGRAM_ENV | {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "RANK": "0"}
    found = [
        int(subprocess.check_output([sys.executable, "-c", code], env=environment)) for code in (ask, f"{bind} {ask}")
    ]
    assert found == [max(1, len(os.sched_getaffinity(0)) // 2), 1]

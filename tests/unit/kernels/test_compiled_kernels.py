"""The Triton kernels through the compiler, for GPUs that are not there, against the table of docs/gpu.md."""

import json
import os
import subprocess
import sys

import pytest
from repository import PROGRAM_ENV, ROOT

pytest.importorskip("triton", reason="Triton is made for Linux only")
PROGRAM = "benchmarks/compiled_kernels.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_kernel_is_over_a_chips_shared_memory_or_spills_more_than_the_table_says(tmp_path):
    """The largest tiles, and the kernels with most registers, on all six chips."""
    from benchmarks.compiled_kernels import CHIPS, KIB, read_table
    from benchmarks.kernel_cases import all_cases

    said = read_table((ROOT / "docs" / "gpu.md").read_text(encoding="utf-8"))
    env = os.environ | {**PROGRAM_ENV, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, PROGRAM, "--short"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(CHIPS) * sum(case.telling for case in all_cases()) >= 50
    for case in found:
        kib, spilled = said[case["row"]][case["target"]]
        assert case["shared"] <= CHIPS[case["target"]][1] * KIB, case
        assert case["shared"] <= (kib + 0.05) * KIB and case["spilled"] <= spilled, (case, kib, spilled)
        if "part_kernel" in case["row"]:
            assert case["tensor cores"] > 0, case
        if "statistics" in case["row"] or "gradient" in case["row"]:
            assert case["registers"] <= 64, case
        narrow = case["accesses"] - case["wide"]  # a token's own numbers, or part of a weight's gradient
        if any(name in case["row"] for name in ("statistics", "gradient", "norm", "rotate")):
            assert case["wide"] >= 2 and narrow <= 8, case


@pytest.mark.parametrize("page", ["docs/gpu.md", "docs/zh/gpu.md"])
def test_the_table_has_every_kernel_on_every_chip_and_nothing_over_a_limit(page):
    from benchmarks.compiled_kernels import CHIPS, read_table
    from benchmarks.kernel_cases import all_cases

    said = read_table((ROOT / page).read_text(encoding="utf-8"))
    assert list(said) == list(dict.fromkeys(case.row for case in all_cases())), "make compiled-kernels"
    for row, cells in said.items():
        assert all(kib <= CHIPS[target][1] for target, (kib, _) in cells.items()), row

"""Split a training step: sampling, reference, update; in each the share of products, attention, elementwise, Python.

    python benchmarks/step_stages.py [--case NAME]   # a case of benchmarks/step.py, a minute

The third step of a run is profiled in this process. Each operation counts with the time that it spends itself, our
compiled kernels by name; what remains of a stage's wall-clock is Python and waiting. The processor's instruction sets
stand above the table, because they decide which products are fast. Below it stands what a step would take with more
threads: by a model, not measured.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gspo  # noqa: F401 -- before torch

# isort: split
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import train
from benchmarks.common import heading, table
from benchmarks.step import CASES, ours, write_rows
from gspo.distributed.world import process_group
from gspo.kernels import native
from gspo.metrics.step_metrics import Clock
from gspo.read_config import load_config

STEP = 3
SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16")
KINDS = {  # what an operation's name holds -> what it is, the first that fits
    "gspo_stack": "all layers of a token in one call",
    "gspo_linear": "products",
    "gspo_rows": "attention",
    "gspo_decode": "attention",
    "attention": "attention",
    "_fused_adamw": "optimizer",
    "mm": "products",
    "linear": "products",
}
COLUMNS = ("products", "all layers of a token in one call", "attention", "optimizer", "elementwise")


def kind_of(operation: str) -> str:
    """Return what an operation is, by its name."""
    return next((kind for part, kind in KINDS.items() if part in operation), "elementwise")


def instruction_sets() -> str:
    """Return the instruction sets of this processor that matrix products may use, as Linux names them."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return ", ".join(name for name in SETS if name in flags) or "unknown"


@contextlib.contextmanager
def profiled(found: dict[str, tuple[float, dict[str, float]]]) -> Iterator[None]:
    """Profile the stages of step STEP: {stage: (wall-clock seconds, {kind: seconds})} is put into `found`."""
    plain_call, plain_clock, seen = native.call, Clock.__call__, defaultdict(int)

    def named_call(kernel: str, **arguments: object) -> None:
        with record_function(kernel):
            plain_call(kernel, **arguments)

    @contextlib.contextmanager
    def clock(self: Clock, stage: str) -> Iterator[None]:
        seen[stage] += 1
        if seen[stage] != STEP:
            with plain_clock(self, stage):
                yield
            return
        with profile(activities=[ProfilerActivity.CPU]) as profiler, plain_clock(self, stage):
            began = time.perf_counter()
            yield
            wall = time.perf_counter() - began
        kinds: dict[str, float] = defaultdict(float)
        for event in profiler.key_averages():
            kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
        found[stage] = wall, kinds

    callers = [m for name, m in list(sys.modules.items()) if name.startswith("gspo.kernels") and hasattr(m, "call")]
    with contextlib.ExitStack() as stack:
        for module in callers:
            if module.call is plain_call:
                stack.enter_context(patch.object(module, "call", named_call))
        stack.enter_context(patch.object(Clock, "__call__", clock))
        yield


def with_threads(found: dict[str, tuple[float, dict[str, float]]], threads: int) -> float:
    """Return the seconds of all stages with so many threads, by Amdahl's law: a model, not a measurement.

    Operations are divided by the threads, Python and waiting are not. It is a bound: memory has the same bandwidth for
    all threads, which the model leaves out.
    """
    share, total = torch.get_num_threads() / threads, 0.0
    for wall, kinds in found.values():
        computed = min(wall, sum(kinds.values()))
        total += wall - computed + computed * share
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="SmolLM2-135M, bf16, short prompts", metavar="NAME")
    args = parser.parse_args()
    case, found = CASES[args.case], {}
    with tempfile.TemporaryDirectory() as name, process_group() as world:
        folder = Path(name)
        settings = ours(case, write_rows(case, folder)[0], STEP, folder, "python")
        cfg = load_config(settings[3], settings[4:])
        with profiled(found):
            train.train(cfg, world)
    rows = []
    for stage, (wall, kinds) in found.items():
        shares = [kinds[kind] / wall for kind in COLUMNS]
        rows.append([stage, f"{wall:.2f}", *(f"{share:.0%}" for share in shares), f"{max(0.0, 1 - sum(shares)):.0%}"])
    title = heading(f"Where a step goes: {args.case}", f"python benchmarks/step_stages.py --case '{args.case}'")
    print(f"{title}\nInstruction sets: {instruction_sets()}; {torch.get_num_threads()} threads.\n")
    print(table(["stage", "seconds", *COLUMNS, "Python, waiting"], rows))
    model = ", ".join(f"{n} threads {with_threads(found, n):.2f} s" for n in (torch.get_num_threads(), 4, 8))
    print(f"\nBy a model (Amdahl's law; memory bandwidth left out), not measured: {model}.")


if __name__ == "__main__":
    main()

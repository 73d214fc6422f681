"""Measure weak scaling on one machine: the same number of prompts a process, with 1, 2 and 4 gloo processes.

python benchmarks/scaling.py [--processes 1 2 4] [--steps 6]        -> benchmarks/scaling.md
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import heading, table

ROOT = Path(__file__).resolve().parent.parent
EVERY_CORE = os.sched_getaffinity(0)
PROMPTS = 32  # a process
STAGES = ["rollout", "reward", "reference", "update", "step"]
FIXED = (
    "trainer.resume=never", "trainer.save_freq=0", "eval.before_and_after=false", "eval.round_prompts=0",
    "reward.check_rows=0", "model.precision=fp32", "optim.epochs_per_rollout=1", "optim.minibatches=1",
)  # fmt: skip


def steps_of(processes: int, steps: int, overrides: list[str]) -> list[dict[str, float]]:
    """Return the metrics of each step of a short run, one core a process, or all cores if there are fewer."""
    cores = sorted(os.sched_getaffinity(0))[:processes]
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
        command = [
            sys.executable, *launcher, "train.py", "--config", "configs/quick.yaml", *FIXED, *overrides,
            f"data.train_batch_size={PROMPTS * processes}", f"trainer.max_steps={steps}",
            f"trainer.output_dir={folder}",
        ]  # fmt: skip
        os.sched_setaffinity(0, cores)
        try:
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        finally:
            os.sched_setaffinity(0, EVERY_CORE)
        lines = (Path(folder) / "quick" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=8, help="steps of each run; the first two are not counted")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    rows, alone = [], None
    for processes in args.processes:
        steps = steps_of(processes, args.steps, args.overrides)[2:]
        middle = {name: statistics.median(step[f"time/{name}"] for step in steps) for name in STAGES}
        speed = statistics.median(step["tokens_per_second"] for step in steps) / processes
        alone = alone or speed
        balance = statistics.median(step["balance"] for step in steps)
        shared = " (they share the cores)" if processes > len(EVERY_CORE) else ""
        rows.append([
            f"{processes}{shared}", *(f"{middle[name]:.2f}" for name in STAGES),
            f"{speed:.0f}", f"{100 * speed / alone:.0f} %", f"{balance:.2f}",
        ])  # fmt: skip
    columns = ["processes", *(f"{name}, s" for name in STAGES), "tokens/s each", "of one's", "balance"]
    text = heading(f"Weak scaling: {PROMPTS} prompts x 4 answers a process, gloo", "python benchmarks/scaling.py")
    text += (
        f"\nMedians of {args.steps - 2} steps of the embedded model; a process has one core.\n\n{table(columns, rows)}"
    )
    (ROOT / "benchmarks" / "scaling.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

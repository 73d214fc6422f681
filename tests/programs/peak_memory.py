"""Train, and print this process's peak memory and that of the memory report, in MiB. Started by test_footprint.py.

[torchrun --nproc_per_node=K] tests/programs/peak_memory.py FOLDER section.key=value ...

What it takes is counted from where the embedded model of 2.5 MiB has been trained once: libraries, threads and code
are in memory by then. To be started with MALLOC_MMAP_THRESHOLD_ set, so that what is freed is given back.
"""

import json
import sys
from pathlib import Path

from gspo.distributed.world import process_group
from gspo.memory.__main__ import report_text
from gspo.memory.footprint import footprint
from gspo.read_config import load_config
from gspo.system.program import end_process
from train import train

STATUS = Path("/proc/self/status")
COMMON = (
    "data.max_prompt_length=100", "rollout.n=4", "rollout.max_new_tokens=48", "trainer.max_steps=2",
    "trainer.resume=never", "trainer.async_save=false", "eval.before_and_after=false", "eval.round_prompts=0",
    "reward.workers=1", "reward.check_rows=0", "data.train_batch_size=8", "rollout.weights=auto",
)  # fmt: skip


def resident(key: str) -> float:
    """MiB, of what the process has in memory now (VmRSS) or had at most since `clear_refs` (VmHWM)."""
    return next(int(line.split()[1]) / 1024 for line in STATUS.read_text().splitlines() if line.startswith(key))


def main() -> None:
    folder, given = sys.argv[1], sys.argv[2:]
    with process_group() as world:
        for name, overrides in (("warm", [x for x in given if x.startswith("reward.path")]), ("measured", given)):
            cfg = load_config(None, [*COMMON, *overrides, f"trainer.output_dir={folder}", f"trainer.run_name={name}"])
            before = resident("VmRSS")
            (STATUS.parent / "clear_refs").write_text("5")  # from here on VmHWM counts anew
            train(cfg, world)
            peak = resident("VmHWM") - before
        report = footprint(cfg, world.size, "cpu", cfg.model.precision, 2**62)
        if world.is_main:
            print(report_text(report, None))
            print(json.dumps({"measured": peak, "reported": report.peak / 2**20}))


if __name__ == "__main__":
    main()
    end_process()

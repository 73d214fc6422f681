"""Measure seconds and peak memory before the first step with a large data file and with a small one.

    python benchmarks/data.py [--gb 1]

Writes a JSONL of that size, and one of 1 MB, into a temporary folder, and runs train.py on each for two steps with the
embedded model. Prints a table; asserts nothing.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import heading, table

ROOT = Path(__file__).resolve().parent.parent
WORDS = re.findall(
    r"\S+",
    "a farmer sells twelve apples and seven pears at the market; how much remains after each train leaves station two "
    "hours late with velocity price Zürich café 解方程 求 苹果 🍎 between price total first second third half double",
)
SETTINGS = (  # steps so small that reading the data dominates
    "data.train_batch_size=4",
    "rollout.max_new_tokens=4",
    "optim.micro_batch_tokens=1024",
    "trainer.max_steps=2",
    "trainer.resume=never",
    "eval.before_and_after=false",
    "eval.round_prompts=0",
    "optim.epochs_per_rollout=1",
    "optim.minibatches=1",
)


def write_rows(path: Path, size: int) -> int:
    """Write a JSONL file of about `size` bytes, and return its number of rows."""
    draw, count, written = random.Random(0), 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            a, b = draw.randrange(10**6), draw.randrange(10**6)
            text = " ".join(draw.choices(WORDS, k=draw.randrange(8, 64)))
            row = {"prompt": f"{text}: {a} + {b} = ?", "ground_truth": str(a + b), "data_source": f"sums{count % 7}"}
            line = json.dumps(row, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())
            count += 1
    return count


def run(data: Path, out: Path) -> tuple[float, float]:
    """Train on it and return (seconds until the first step is logged, peak resident MB of the main process)."""
    command = [sys.executable, "train.py", "--config", "configs/quick.yaml", *SETTINGS]
    command += [f"data.train_files=[{data}]", f"trainer.output_dir={out}"]
    log = out.with_suffix(".log")
    begun, first = time.monotonic(), None
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if first is None and any(f.stat().st_size for f in out.glob("*/metrics.jsonl")):
                first = time.monotonic() - begun
            if pid:
                break
            time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or first is None:
        sys.exit(f"train.py failed:\n{log.read_text(errors='replace')[-3000:]}")
    return first, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the large file (default: %(default)s)")
    sizes = {"small": 10**6, "large": int(parser.parse_args().gb * 10**9)}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, size in sizes.items():
            data = Path(folder) / f"{name}.jsonl"
            rows = write_rows(data, size)
            seconds, peak = run(data, Path(folder) / name)
            lines.append([f"{data.stat().st_size / 1e6:,.0f} MB", f"{rows:,}", f"{seconds:.1f}", f"{peak:,.0f}"])
            data.unlink()
    print(heading("A large data file", "make bench-data"))
    print(table(["file", "rows", "seconds to the first step", "peak memory, MB"], lines))


if __name__ == "__main__":
    main()

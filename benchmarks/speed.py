"""Run all speed benchmarks of the CPU and write their tables to kernels/BENCH.md (a GPU's: gpu_day.sh).

    python benchmarks/speed.py [--only WORD]

`--only` runs the benchmarks whose command contains the word, and leaves the other tables in the file as they are.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "kernels" / "BENCH.md"
PREFACE = """# Measurements

Made by `make bench`; all contestants of a table ran one after another. The machines are
shared and noisy: compare ratios within a table.
"""
RUNS = (
    "operations.py --device cpu --dtype float32",
    "operations.py --device cpu --dtype bfloat16",
    "step.py",
    "rollout.py",
)


def replaced(text: str, command: str, section: str) -> str:
    """Return the text with this command's section replaced, or added at the end."""
    parts = re.split(r"(?m)^(?=## )", text)
    for k, part in enumerate(parts):
        if f"`python benchmarks/{command}`" in part:
            parts[k] = section
            return "".join(parts)
    return "".join([*parts, section])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD")
    args = parser.parse_args()
    chosen = [command for command in RUNS if args.only in command]
    if not chosen:
        parser.error(f"--only {args.only}: none of {', '.join(RUNS)}")
    failed = []
    for command in chosen:
        print(f"python benchmarks/{command}", file=sys.stderr, flush=True)
        script, *options = command.split()
        done = subprocess.run(
            [sys.executable, f"benchmarks/{script}", *options], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        if done.returncode:
            failed.append(command)
            continue
        text = FILE.read_text(encoding="utf-8") if FILE.exists() else PREFACE
        FILE.write_text(replaced(text, command, "\n" * (not FILE.exists()) + done.stdout), encoding="utf-8")
        print(done.stdout, flush=True)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()

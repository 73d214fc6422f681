"""Train the embedded model with rewards 0 and 1, and with -1 and +1: held-out accuracy must not depend on the range.

    python benchmarks/reward_range.py [--seeds 3]   # six runs of configs/quick.yaml, a minute each

Writes benchmarks/reward_range.md. A run that is complete in outputs/reward_range is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import heading, table

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "outputs" / "reward_range"
LEVELS = {"0 and 1": (0.0, 1.0), "-1 and +1": (-1.0, 1.0)}  # wrong, right


def evaluations(name: str, wrong: float, right: float, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the evaluations on the test rows before and after a run; train it unless it is there."""
    run = RUNS / f"{name.replace(' ', '_')}_seed{seed}"
    if not (run / "eval_after.json").exists():
        settings = [f"trainer.seed={seed}", f"trainer.output_dir={RUNS}", f"trainer.run_name={run.name}"]
        settings += ["reward.path=benchmarks/right_or_wrong_reward.py", "trainer.save_freq=0"]
        settings += [f"reward.reward_kwargs={{right: {right}, wrong: {wrong}}}"]
        subprocess.run([sys.executable, "train.py", "--config", "quick", *settings], cwd=ROOT, check=True)
    before, after = (json.loads((run / f"eval_{when}.json").read_text()) for when in ("before", "after"))
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each range (default: %(default)s)")
    args = parser.parse_args()
    rows = []
    for name, (wrong, right) in LEVELS.items():
        accuracies = []
        for seed in range(args.seeds):
            before, after = evaluations(name, wrong, right, seed)
            low, high = after["interval"]["pass@1"]
            accuracies.append(after["pass@1"])
            rows.append(
                [name, str(seed), f"{before['pass@1']:.3f}", f"{after['pass@1']:.3f}", f"{low:.3f} to {high:.3f}"]
            )
        rows.append([name, "mean", "", f"{statistics.mean(accuracies):.3f}", ""])
    title = heading("Rewards of 0 and 1, and of -1 and +1", f"python benchmarks/reward_range.py --seeds {args.seeds}")
    text = title + "\n" + table(["rewards", "seed", "pass@1 before", "after", "95 % interval"], rows)
    (ROOT / "benchmarks" / "reward_range.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

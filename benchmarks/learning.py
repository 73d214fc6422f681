"""Compare how well each method learns from the same checkpoint and prompts, each at its own best learning rate.

    python benchmarks/learning.py [main | ablations] [--fast] [--tasks ...] [--seeds K] [--out DIR]

For every task and method a grid of learning rates is run with one seed and judged on the dev split; the best one runs
with K seeds and is judged on the test split. Each run's result is saved as soon as it ends: the same command continues
where it stopped. Writes learning.csv, learning.md and learning.png beside this file, or to the folder of --out.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import heading
from benchmarks.learning_methods import ABLATIONS, COMMON, FAST, GRID, GRID_SEED, METHODS, POOL, TASKS, Job
from benchmarks.learning_report import draw, grid_score, sections, write_csv

ROOT = Path(__file__).resolve().parent.parent


def code() -> str:
    """Return a hash of all files that a result depends on, in addition to its settings."""
    digest = hashlib.sha256()
    parts = ["train.py", "configs/quick.yaml", "benchmarks/*_reward.py", "gspo/**/*.py", "gspo/**/*.safetensors"]
    for file in sorted(file for part in parts for file in ROOT.glob(part)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def run(job: Job, out: str, version: str) -> dict[str, Any]:
    """Return the result of a job: the saved one if it is of this version of the code, else that of a new run."""
    folder = job.folder(Path(out))
    kept, stamp = folder / "result.json", [version, *job.settings]
    if kept.exists() and (result := json.loads(kept.read_text()))["settings"] == stamp:
        return result
    result = {"settings": stamp, **train_once(job, folder)}
    kept.write_text(json.dumps(result))
    return result


def train_once(job: Job, folder: Path) -> dict[str, Any]:
    """Train and evaluate in this process, and return the numbers of the run."""
    import torch

    import train
    from gspo.distributed.world import process_group
    from gspo.read_config import load_config

    torch.manual_seed(0)
    shutil.rmtree(folder, ignore_errors=True)
    where = [f"trainer.output_dir={folder.parent}", f"trainer.run_name={folder.name}", "trainer.keep_best=false"]
    settings = [*job.settings, *where]
    began = time.monotonic()
    folder.mkdir(parents=True)
    with (folder / "log").open("w") as log, contextlib.redirect_stdout(log), process_group() as world:
        train.train(load_config(ROOT / "configs/quick.yaml", settings), world)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, after = (json.loads((folder / f"eval_{name}.json").read_text()) for name in ("before", "after"))
    evaluated = [r for r in rows if "heldout/accuracy" in r]
    for part in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / part)
    return {
        "seconds": time.monotonic() - began,
        **{key: after[key] for key in ("pass@1", "pass@8", "greedy", "correct_counts")},
        "reward": after["reward_mean"],
        "before": {key: before[key] for key in ("pass@1", "pass@8", "greedy")},
        "length": rows[-1]["response/length_mean"],
        "kl": evaluated[-1]["kl_to_initial"],
        "tokens": [r["tokens_sampled"] for r in evaluated],
        "dev": [r["heldout/accuracy"] for r in evaluated],
        "dev_kl": [r["kl_to_initial"] for r in evaluated],
    }


def claim_core(cores: "multiprocessing.Queue[int]") -> None:
    """Give this process a core of its own, and so one thread: the numbers do not depend on what else runs."""
    parent = os.getppid()

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    core = cores.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def run_all(jobs: list[Job], out: Path, label: str) -> dict[Job, dict[str, Any]]:
    """Run all jobs, as many at a time as there are cores."""
    from gspo.system.console import track

    available = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    )
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for core in available:
        cores.put(core)
    results = {}
    with ProcessPoolExecutor(len(available), context, claim_core, (cores,)) as pool:
        version = code()
        waiting = {pool.submit(run, job, str(out), version): job for job in jobs}
        try:
            for done in track(as_completed(waiting), label, total=len(waiting)):
                results[waiting[done]] = done.result()
        except KeyboardInterrupt:
            print("interrupted; the same command continues with the runs that are not done", flush=True)
            os._exit(130)  # the workers follow
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def job(task: str, method: str, settings: list[str], lr: float, seed: int, fast: list[str]) -> Job:
    """Make the job of one run from the settings of its task and method."""
    chosen = [*COMMON, *TASKS[task], *settings, *fast, f"optim.learning_rate={lr}", f"trainer.seed={seed}"]
    return Job(task, method, lr, seed, tuple(chosen))


def best_rates(tasks: list[str], methods: list[str], out: Path) -> dict[tuple[str, str], float]:
    """Return {(task, method): the learning rate of the grid with the best dev accuracy}."""
    jobs = [job(t, m, METHODS[m], lr, GRID_SEED, []) for t in tasks for m in methods for lr in GRID]
    results = run_all(jobs, out, "learning rates")
    best: dict[tuple[str, str], float] = {}
    for t, m in itertools.product(tasks, methods):
        scored = {j.lr: grid_score(r) for j, r in results.items() if (j.task, j.method) == (t, m)}
        best[t, m] = max(scored, key=lambda lr: scored[lr])
    return best


def prepare_data() -> None:
    """Write both tasks' splits, and the first POOL rows of their training splits."""
    from gspo.embedded import equations, systems

    equations.write_splits()
    systems.write_splits(systems.DATA_DIR)
    for task in TASKS:
        rows = json.loads((ROOT / "data" / task / "train.json").read_text(encoding="utf-8"))
        file = ROOT / "data" / task / f"train_{POOL}.json"
        file.write_text(json.dumps(rows[:POOL], ensure_ascii=False, indent=0), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("main", "ablations"), default="main")
    parser.add_argument(
        "--fast", action="store_true", help="a quarter of the steps, one seed and learning rate: minutes"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--seeds", type=int, default=None, help="final runs a method (default 5, ablations 3, --fast 1)"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder for runs, table and picture")
    args = parser.parse_args()
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least one run of each is needed.")
    out = (args.out or ROOT / "outputs" / ("bench-fast" if args.fast else "bench")).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        parser.error(f"--out {out}: {e.strerror}.")
    os.chdir(ROOT)
    fast = FAST if args.fast else []
    ablations = args.what == "ablations"
    seeds = range(args.seeds or (1 if args.fast else 3 if ablations else 5))
    prepare_data()

    rates = {(t, m): 2e-4 for t in args.tasks for m in METHODS}
    if not args.fast:
        rates = best_rates(args.tasks, ["GSPO"] if ablations else list(METHODS), out)
    if not ablations:
        jobs = [job(t, m, METHODS[m], rates[t, m], s, fast) for t in args.tasks for m in METHODS for s in seeds]
        names, against = METHODS, None
    else:
        jobs = [
            job(t, m, a, rates[t, "GSPO"], s, fast) for t in args.tasks for m, a in ABLATIONS.items() for s in seeds
        ]
        names, against = ABLATIONS, "default"
    began = time.monotonic()
    results = run_all(jobs, out, args.what)
    by_task = {t: {m: [results[j] for j in jobs if (j.task, j.method) == (t, m)] for m in names} for t in args.tasks}
    used = {t: {m: rates[t, "GSPO" if ablations else m] for m in names} for t in args.tasks}
    command = f"make bench-{'ablations' if ablations else 'learning'}{' ARGS=--fast' if args.fast else ''}"
    title = "Learning: ablations" if ablations else "Learning"
    text = "\n".join([heading(title, command), *sections(by_task, used, against)])
    target = out if args.out or args.fast else ROOT / "benchmarks"
    stem = "ablations" if ablations else "learning"
    (target / f"{stem}.md").write_text(text, encoding="utf-8")
    write_csv(target / f"{stem}.csv", results)
    if not ablations:
        draw(target / "learning.png", by_task)
    print(f"{text}\n{len(jobs)} runs, {time.monotonic() - began:.0f} s; written to {target}")


if __name__ == "__main__":
    main()

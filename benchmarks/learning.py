"""Does it learn better? Every method on the same checkpoint, prompts and samples, each at its own best step size.

    python benchmarks/learning.py [main | ablations] [--fast] [--tasks ...] [--seeds K] [--out DIR]

For every task and method a grid of learning rates is run with one seed and judged on the dev split; the best runs with
K seeds and is judged on the test split. A run's result is kept as soon as it is there: the same command goes on where
it stopped. Writes learning.csv, learning.md and learning.png beside this file (with --out: there).
"""

import argparse
import contextlib
import csv
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import heading, table

ROOT = Path(__file__).resolve().parent.parent
GRID = (5e-5, 1e-4, 2e-4, 4e-4)
GRID_SEED = 100  # no final run has it
EVERY = 8  # steps between looks at the dev split
POOL = 512  # training prompts: three epochs of 16 steps

TASKS = {
    "equations": [
        f"data.train_files=[data/equations/train_{POOL}.json]",
        "data.val_files=[data/equations/dev.json]",
        "data.test_files=[data/equations/test.json]",
        "rollout.max_new_tokens=32",
    ],
    "systems": [
        "model.path=gspo/embedded/systems_model",
        "reward.path=benchmarks/systems_reward.py",
        f"data.train_files=[data/systems/train_{POOL}.json]",
        "data.val_files=[data/systems/dev.json]",
        "data.test_files=[data/systems/test.json]",
        "rollout.max_new_tokens=64",
    ],
}
COMMON = [
    *("rollout.n=4", "data.train_batch_size=32", "selfplay.rounds=2", "trainer.max_steps=48"),
    *("optim.schedule=cosine", "optim.min_lr_ratio=0.1", "optim.warmup_steps=5"),
    *("optim.epochs_per_rollout=2", "optim.minibatches=2"),
    *("eval.n=8", "eval.prompts=256", "eval.round_prompts=128", f"eval.freq={EVERY}"),
    *("trainer.save_freq=0", "trainer.keep_last=1", "trainer.sample_rows=0", "reward.workers=1", "reward.check_rows=0"),
]
FAST = ["trainer.max_steps=12", "optim.warmup_steps=2", "eval.prompts=96", "eval.round_prompts=64", "eval.freq=4"]
METHODS = {
    "GSPO": [],
    "GSPO, literal formula": ["objective.anchor=none", "objective.after_fork=1"],
    "RLOO": ["objective.algorithm=rloo"],
    "GRPO": ["objective.algorithm=grpo"],
    "Dr. GRPO": ["objective.algorithm=dr_grpo"],
    "online DPO": ["objective.algorithm=online_dpo"],
    "SPIN": ["objective.algorithm=spin"],
}
OURS = ("GSPO", "GSPO, literal formula")
ABLATIONS = {  # one choice at a time, at GSPO's own best step size
    "default": [],
    **{f"after_fork {w}": [f"objective.after_fork={w}"] for w in (0, 0.1, 1)},
    **{f"anchor {a}": [f"objective.anchor={a}"] for a in ("none", "initial", "old")},
    "no ranking loss": ["objective.use_ranking_loss=false"],
    **{f"Z {z}": [f"objective.normalizer={z}"] for z in ("batch", "group", "sqrt")},
    "pair weight gap": ["objective.pair_weight=gap"],
    **{f"margin {m}": [f"objective.margin={m}"] for m in (0, 0.05, 0.2)},
    # The same number of sampled answers a step.
    **{f"N {n}": [f"rollout.n={n}", f"data.train_batch_size={128 // n}"] for n in (2, 8, 12)},
    **{f"rounds {r}": [f"selfplay.rounds={r}"] for r in (1, 3, 5)},
    "one step a rollout": ["optim.epochs_per_rollout=1", "optim.minibatches=1"],
    "prompts not spaced": ["data.spaced=false"],
    "RLOO": ["objective.algorithm=rloo"],  # ... and what of it helps a baseline
    "RLOO, prompts not spaced": ["objective.algorithm=rloo", "data.spaced=false"],
}


@dataclass(frozen=True)
class Job:
    """One training run."""

    task: str
    method: str
    lr: float
    seed: int
    settings: tuple[str, ...]

    def folder(self, out: Path) -> Path:
        name = f"{self.method}-{self.lr:g}-{self.seed}".replace(" ", "_").replace(",", "").replace(".", "_")
        return out / "runs" / self.task / name


def code() -> str:
    """A fingerprint of what a result follows from, beside its settings."""
    digest = hashlib.sha256()
    parts = ["train.py", "configs/quick.yaml", "benchmarks/*_reward.py", "gspo/**/*.py", "gspo/**/*.safetensors"]
    for file in sorted(file for part in parts for file in ROOT.glob(part)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def run(job: Job, out: str, version: str) -> dict[str, Any]:
    """The result of a job, trained for in this process unless this version of the code has done it."""
    folder = job.folder(Path(out))
    kept, stamp = folder / "result.json", [version, *job.settings]
    if kept.exists() and (result := json.loads(kept.read_text()))["settings"] == stamp:
        return result
    result = {"settings": stamp, **train_once(job, folder)}
    kept.write_text(json.dumps(result))
    return result


def train_once(job: Job, folder: Path) -> dict[str, Any]:
    """Train and evaluate; what the run shows."""
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
    looks = [r for r in rows if "heldout/accuracy" in r]
    for part in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / part)
    return {
        "seconds": time.monotonic() - began,
        **{key: after[key] for key in ("pass@1", "pass@8", "greedy", "correct_counts")},
        "reward": after["reward_mean"],
        "before": {key: before[key] for key in ("pass@1", "pass@8", "greedy")},
        "length": rows[-1]["response/length_mean"],
        "kl": looks[-1]["kl_to_initial"],
        "tokens": [r["tokens_sampled"] for r in looks],
        "dev": [r["heldout/accuracy"] for r in looks],
        "dev_kl": [r["kl_to_initial"] for r in looks],
    }


def claim_core(cores: "multiprocessing.Queue[int]") -> None:
    """Each process has one core to itself, and so one thread: the same numbers whatever runs beside it."""
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
    """All jobs, as many at a time as there are cores."""
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
            print("interrupted; the same command goes on with the runs that are not done", flush=True)
            os._exit(130)  # the workers follow
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def job(task: str, method: str, settings: list[str], lr: float, seed: int, fast: list[str]) -> Job:
    chosen = [*COMMON, *TASKS[task], *settings, *fast, f"optim.learning_rate={lr}", f"trainer.seed={seed}"]
    return Job(task, method, lr, seed, tuple(chosen))


def grid_score(result: dict[str, Any]) -> float:
    """Mean dev accuracy of the last third of the run: its height, less of its noise."""
    dev = result["dev"]
    return float(np.mean(dev[-max(1, len(dev) // 3) :]))


def best_rates(tasks: list[str], methods: list[str], out: Path) -> dict[tuple[str, str], float]:
    """{(task, method): the learning rate of the grid that does best on dev}."""
    jobs = [job(t, m, METHODS[m], lr, GRID_SEED, []) for t in tasks for m in methods for lr in GRID]
    results = run_all(jobs, out, "learning rates")
    best: dict[tuple[str, str], float] = {}
    for t, m in itertools.product(tasks, methods):
        scored = {j.lr: grid_score(r) for j, r in results.items() if (j.task, j.method) == (t, m)}
        best[t, m] = max(scored, key=lambda lr: scored[lr])
    return best


# ---- the table ----


def difference(
    mine: list[dict[str, Any]], theirs: list[dict[str, Any]], draws: int = 4000
) -> tuple[float, float, float]:
    """(mean, low, high) of the difference in test pass@1: paired bootstrap over seeds and prompts, 95 %."""
    a, b = (np.array([r["correct_counts"] for r in rs], float) / 8 for rs in (mine, theirs))  # [seeds, prompts]
    gap, rng = a - b, np.random.default_rng(0)
    seeds = rng.integers(0, gap.shape[0], (draws, gap.shape[0]))
    prompts = rng.integers(0, gap.shape[1], (draws, gap.shape[1]))
    means = [gap[s][:, p].mean() for s, p in zip(seeds, prompts, strict=True)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(gap.mean()), float(low), float(high)


def verdict(gap: tuple[float, float, float]) -> str:
    """`ahead`, `behind`, or `tie` where the interval holds 0."""
    _, low, high = gap
    return "ahead" if low > 0 else "behind" if high < 0 else "tie"


def best_within_kl(result: dict[str, Any], limit: float = 0.1) -> float:
    """The best dev accuracy of the run while KL to the initial model was within the limit."""
    return max((a for a, kl in zip(result["dev"], result["dev_kl"], strict=True) if kl <= limit), default=float("nan"))


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation of those that are numbers, and how many are where some are not."""
    known = [v for v in values if not np.isnan(v)]
    if not known:
        return "never"
    deviation = np.std(known, ddof=1) if len(known) > 1 else 0.0
    some = "" if len(known) == len(values) else f" ({len(known)} of {len(values)})"
    return f"{np.mean(known):.{digits}f} ± {deviation:.{digits}f}{some}"


def task_table(results: dict[str, list[dict[str, Any]]], rates: dict[str, float], against: str) -> str:
    """A line a method: means and standard deviations over seeds, and the difference to `against`."""
    before = next(iter(results.values()))[0]["before"]
    lines = [["before training", "", *(f"{before[k]:.3f}" for k in ("pass@1", "pass@8")), *[""] * 5]]
    for method, runs in results.items():
        gap = difference(runs, results[against])
        said = "" if method == against else "{:+.3f} [{:+.3f}, {:+.3f}] {}".format(*gap, verdict(gap))
        column = {key: [r[key] for r in runs] for key in ("pass@1", "pass@8", "kl", "length")}
        lines.append(
            [
                *(method, f"{rates[method]:g}", spread(column["pass@1"]), spread(column["pass@8"])),
                *(spread([grid_score(r) for r in runs]), spread([best_within_kl(r) for r in runs])),
                *(spread(column["kl"]), f"{np.mean(column['length']):.1f}", said),
            ]
        )
    titles = [
        "",
        "lr",
        "pass@1",
        "pass@8",
        "dev, last third",
        "best dev at KL ≤ 0.1",
        "KL",
        "length",
        f"against {against}",
    ]
    return table(titles, lines)


def best_baseline(results: dict[str, list[dict[str, Any]]]) -> str:
    means = {m: np.mean([r["pass@1"] for r in runs]) for m, runs in results.items() if m not in OURS}
    return max(means, key=lambda m: means[m])


def write_csv(path: Path, results: dict[Job, dict[str, Any]]) -> None:
    with path.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(
            ["task", "method", "lr", "seed", "pass@1", "pass@8", "greedy", "reward", "kl", "length", "seconds"]
        )
        for j, r in results.items():
            numbers = [f"{r[k]:.4f}" for k in ("pass@1", "pass@8", "greedy", "reward", "kl", "length")]
            writer.writerow([j.task, j.method, j.lr, j.seed, *numbers, f"{r['seconds']:.0f}"])


def draw(path: Path, by_task: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Dev accuracy against sampled tokens, one panel a task; bands are standard deviations over seeds."""
    try:
        import matplotlib
    except ImportError:
        return print("no picture: it needs matplotlib (make dev)")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(by_task), figsize=(6 * len(by_task), 4), squeeze=False)
    for axis, (task, results) in zip(axes[0], by_task.items(), strict=True):
        for method, runs in results.items():
            tokens = np.mean([r["tokens"] for r in runs], 0)
            dev = np.array([r["dev"] for r in runs])
            (line,) = axis.plot(tokens / 1000, dev.mean(0), label=method, linewidth=2.2 if method == "GSPO" else 1.2)
            axis.fill_between(
                tokens / 1000, *(dev.mean(0) + k * dev.std(0) for k in (-1, 1)), alpha=0.12, color=line.get_color()
            )
        axis.set(title=task, xlabel="sampled tokens, thousands", ylabel="held-out accuracy")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return None


def prepare_data() -> None:
    from gspo.embedded import equations, systems

    equations.write_splits()
    systems.write_splits(systems.DATA_DIR)
    for task in TASKS:
        rows = json.loads((ROOT / "data" / task / "train.json").read_text(encoding="utf-8"))
        file = ROOT / "data" / task / f"train_{POOL}.json"
        file.write_text(json.dumps(rows[:POOL], ensure_ascii=False, indent=0), encoding="utf-8")


def sections(by_task: dict, rates: dict[str, dict[str, float]], against: str | None) -> Iterator[str]:
    for task, results in by_task.items():
        yield f"### {task}\n"
        yield task_table(results, rates[task], against or best_baseline(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("main", "ablations"), default="main")
    parser.add_argument("--fast", action="store_true", help="a quarter of the steps, one seed, one step size: minutes")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=None, help="final runs of each (default 5, ablations 3, --fast 1)")
    parser.add_argument("--out", type=Path, default=None, help="where runs, table and picture go")
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

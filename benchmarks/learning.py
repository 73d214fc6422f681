"""Compare how well each method learns from the same model and prompts, each at its own best step size and KL weight.

    python benchmarks/learning.py develop   # on the development tasks: which variant of GSPO becomes the default?
    python benchmarks/learning.py report    # on tasks that nothing was chosen on: GSPO beside its rivals

For each task and method, a climb over learning rates and KL weights is judged on the dev split; the best point runs
with further seeds and is judged on the test split. A run is kept as soon as it ends, as a line of
benchmarks/learning.jsonl: the same command goes on where it stopped.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import heading
from benchmarks.learning_methods import (
    COMMON,
    DEVELOPMENT,
    EPOCHS,
    FAST,
    KL_WEIGHT,
    METHODS,
    POOL,
    REPORT,
    SECOND,
    TASKS,
    TUNING,
    TUNING_SEEDS,
    VARIANTS,
)  # fmt: skip
from benchmarks.learning_report import draw, task_table, whole_table
from benchmarks.learning_runs import ROOT, Job, Result, Results, before_training, in_parallel, result_of
from benchmarks.learning_search import Point, best_point, dev_score

HERE = Path(__file__).resolve().parent
STAGES = {  # stage -> tasks, methods, the method that the others are compared with, seeds, title
    "develop": (DEVELOPMENT, VARIANTS, "original", 3, "Learning: variants of GSPO on the development tasks"),
    "report": (REPORT, METHODS, "GSPO", 5, "Learning"),
}


def make_job(task: str, method: str, settings: list[str], at: Point, seed: int, fast: bool, tested: bool) -> Job:
    """Make the job of one run from the settings of its task and method."""
    second, _ = SECOND.get(method, KL_WEIGHT)
    point = [f"optim.learning_rate={at[0]:g}", f"{second}={at[1]:g}", f"trainer.seed={seed}"]
    cheaper = TUNING if task in REPORT and not tested else []
    own = [setting.replace("{task}", task) for setting in settings]
    chosen = [*COMMON, *TASKS[task], *own, *cheaper, *(FAST if fast else []), *point]
    return Job(task, method, *at, seed, tuple(chosen), tested)


def search(task: str, method: str, settings: tuple[str, ...], file: str, scratch: str, fast: bool) -> Point:
    """Return a method's best (learning rate, KL weight) on a task, by its dev split and seeds of no table."""

    def score(at: Point, run: int) -> float:
        job = make_job(task, method, list(settings), at, TUNING_SEEDS[run], fast, tested=False)
        return dev_score(result_of(job, Results(Path(file)), Path(scratch)))

    return best_point(score, SECOND.get(method, KL_WEIGHT)[1])[0]


def final(job: Job, file: str, scratch: str) -> Result:
    """Return the result of a run whose numbers stand in a table."""
    return result_of(job, Results(Path(file)), Path(scratch))


def start(task: str, fast: bool) -> Result:
    """Return the accuracies before training; for a process of its own."""
    return before_training([*COMMON, *TASKS[task], *(FAST if fast else [])])


def write_splits(tasks: Iterable[str]) -> None:
    """Write the splits of the tasks, and the first POOL rows of their training splits."""
    for task in tasks:
        folder = ROOT / "data" / task
        importlib.import_module(f"gspo.embedded.{task}").write_splits(folder)
        rows = json.loads((folder / "train.json").read_text(encoding="utf-8"))
        text = json.dumps(rows[:POOL], ensure_ascii=False, indent=0)
        (folder / f"train_{POOL}.json").write_text(text, encoding="utf-8")


def write_pairs(task: str) -> None:
    """Write the best and the worst of eight responses to each of POOL prompts, EPOCHS times, by the task's model."""
    folder, settings = ROOT / "data" / task, dict(setting.split("=", 1) for setting in TASKS[task])
    rows = json.loads((folder / f"train_{POOL}.json").read_text(encoding="utf-8")) * EPOCHS
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    where = [settings.get("model.path", "embedded"), str(folder / "prompts.jsonl"), str(folder / "pairs.jsonl")]
    how = ["--pairs", "--n", "8", "--max_new_tokens", settings["rollout.max_new_tokens"], "--precision", "fp32"]
    reward = ["--reward_func", settings["reward.path"]] if "reward.path" in settings else []
    subprocess.run([sys.executable, "-m", "gspo.sample", *where, *how, *reward], cwd=ROOT, check=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=STAGES, default="report")
    parser.add_argument("--fast", action="store_true", help="a quarter of the steps, no search, one seed: minutes")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=None)
    parser.add_argument("--methods", nargs="+", default=None, help="only these rows")
    parser.add_argument("--seeds", type=int, default=None, help="runs a row (develop: 3, report: 5, --fast: 1)")
    parser.add_argument("--out", type=Path, default=None, help="folder of runs and tables (default: benchmarks/)")
    args = parser.parse_args()
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least one run of each is needed.")
    known = {*VARIANTS, *METHODS}
    if args.methods and (unknown := [m for m in args.methods if m not in known]):
        parser.error(f"--methods {unknown[0]}: not one of {', '.join(sorted(known))}.")
    args.out = (args.out or (ROOT / "outputs" / "bench-fast" if args.fast else HERE)).resolve()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        parser.error(f"--out {args.out}: {e.strerror}.")
    return args


def run_stage(stage: str, args: argparse.Namespace) -> None:
    """Run a stage's searches and final runs, and write its tables."""
    tasks, methods, ours, seeds, title = STAGES[stage]
    tasks = [t for t in tasks if t in (args.tasks or tasks)]
    methods = {m: s for m, s in methods.items() if m in (args.methods or methods) or m == ours}
    seeds = args.seeds or (1 if args.fast else seeds)
    file, scratch = args.out / ("learning_fast.jsonl" if args.fast else "learning.jsonl"), ROOT / "outputs" / "bench"
    rows = [(task, method) for method in methods for task in tasks]
    if "offline DPO" in methods:
        for task in tasks:
            write_pairs(task)
    kept = (str(file), str(scratch), args.fast)
    if args.fast:
        points: dict[tuple[str, str], Point] = {row: SECOND.get(row[1], KL_WEIGHT)[1] for row in rows}
    else:
        found = in_parallel(search, [(t, m, tuple(methods[m]), *kept) for t, m in rows], f"{stage}: searches")
        points = {call[:2]: point for call, point in found.items()}
    jobs = {
        (t, m, seed): (make_job(t, m, methods[m], points[t, m], seed, args.fast, tested=True), *kept[:2])
        for t, m in rows
        for seed in range(seeds)
    }
    results = in_parallel(final, jobs.values(), stage)
    by_task = {t: {m: [results[jobs[t, m, seed]] for seed in range(seeds)] for m in methods} for t in tasks}
    before = in_parallel(start, [(t, args.fast) for t in tasks], "before training")
    write_tables(stage, title, by_task, {t: before[t, args.fast] for t in tasks}, ours, args.out)


def write_tables(
    stage: str, title: str, by_task: dict[str, dict[str, list[Result]]], before: dict[str, Any], ours: str, out: Path
) -> None:
    """Write the tables of a stage as markdown, and its curves as a picture."""
    stem = "learning" if stage == "report" else "learning_variants"
    text = [heading(title, f"python benchmarks/learning.py {stage}")]
    text += [
        "Runs that were kept are among them, from other days and processors (learning.jsonl): CPU seconds differ.\n"
    ]
    if len(by_task) > 1:
        text += ["### All tasks\n", whole_table(by_task, ours)]
    for task, runs in by_task.items():
        text += [f"### {task}\n", task_table(runs, before[task], ours)]
    (out / f"{stem}.md").write_text("\n".join(text), encoding="utf-8")
    draw(out / f"{stem}.png", by_task, ours)
    print("\n".join(text))


def main() -> None:
    args = options()
    os.chdir(ROOT)
    write_splits(TASKS)
    run_stage(args.stage, args)


if __name__ == "__main__":
    main()

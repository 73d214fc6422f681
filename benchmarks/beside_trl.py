"""Train the same model on the same rows with GSPO and with TRL's GRPOTrainer: held-out accuracy against wall-clock.

    python benchmarks/beside_trl.py number_words   # SmolLM2-135M-Instruct learns to write numbers in digits
    python benchmarks/beside_trl.py equations      # the embedded model, our own GRPO beside TRL's: an outside check

Both sample the same number of responses to as many prompts a step, take as many optimizer steps with the same schedule
and score with the same reward function. On `number_words` we learn with the step size of the configuration, which was
chosen with other seeds (docs/learning-on-a-real-model.md), and TRL with its own best: from ours, twice and half of it
are tried in runs of half the length, judged on the dev split, until both neighbours of the best are worse. Further
seeds are judged on the test split. Every `every` steps the model is kept, and all are evaluated afterwards by the same
evaluator. Seconds are those of training steps, without loading, keeping and evaluating models. A run is kept as soon as
it ends, a line of benchmarks/beside_trl.jsonl: the same command goes on where it stopped.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.beside_trl_report import Result, at_pace, draw, lines_of, search_lines
from benchmarks.common import heading
from gspo.config import Config
from gspo.read_config import load_config

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
TUNING_SEED = 100  # of the runs that choose step sizes; no run of a table has it
OURS, TRL = "GSPO", "TRL GRPOTrainer"


@dataclass(frozen=True)
class Workload:
    """What is trained and how: a configuration, settings for both, and each contestant's own."""

    config: str
    steps: int
    every: int  # steps between two evaluations
    settings: tuple[str, ...]
    ours: tuple[str, ...]
    trl: tuple[str, ...]  # flags of benchmarks/peers/trl_learn.py
    first: float  # our step size, with which TRL's search begins
    search: bool = True  # False: TRL learns with `first` as well


WORKLOADS = {
    "number_words": Workload(
        config="configs/smollm2_number_words.yaml",
        steps=32,
        every=8,
        settings=(),
        ours=(),
        trl=(),
        first=6e-6,
    ),
    # The KL term is left out: we sum it over a response's tokens, TRL takes their mean.
    "equations": Workload(
        config="configs/quick.yaml",
        steps=48,
        every=16,
        settings=(
            *("model.precision=fp32", "data.train_files=[data/equations/train.json]"),
            *("data.val_files=[data/equations/dev.json]", "data.test_files=[data/equations/test.json]"),
            *("rollout.n=8", "data.train_batch_size=16", "data.spaced=false", "optim.minibatches=2"),
            *("optim.epochs_per_rollout=2", "optim.warmup_steps=5", "objective.kl_coef=0", "selfplay.rounds=1"),
        ),
        ours=("objective.algorithm=grpo",),
        trl=("--loss=grpo",),
        first=2e-4,
        search=False,
    ),
}
FAST = ("data.train_batch_size=4", "rollout.n=4", "optim.warmup_steps=0", "eval.prompts=16")  # to see that it works
OUR_NAMES = {"number_words": OURS, "equations": "our grpo"}


@dataclass(frozen=True)
class Job:
    """One training run, and the split that its models are judged on."""

    workload: str
    method: str
    lr: float
    seed: int
    split: str
    steps: int
    every: int
    settings: tuple[str, ...]
    flags: tuple[str, ...] = ()

    def key(self) -> str:
        """Return what tells this run from others: a hash of its settings and of its configuration file."""
        file = (ROOT / WORKLOADS[self.workload].config).read_text(encoding="utf-8")
        return hashlib.sha256(json.dumps([asdict(self), file]).encode()).hexdigest()[:16]

    def overrides(self) -> list[str]:
        """Return the settings of the run that both contestants read."""
        return [
            *(*self.settings, f"optim.learning_rate={self.lr:g}", f"trainer.seed={self.seed}"),
            *(f"trainer.max_steps={self.steps}", "eval.before_and_after=false", "eval.round_prompts=0", "eval.freq=0"),
        ]


# ---- one run ----


def our_command(job: Job, folder: Path) -> list[str]:
    where = [f"trainer.output_dir={folder}", "trainer.run_name=run", "trainer.resume=never"]
    keep = [f"trainer.save_freq={job.every}", "trainer.keep_last=0", "trainer.keep_best=false"]
    settings = [*job.overrides(), *where, *keep, "trainer.async_save=false", "trainer.sample_rows=0"]
    return [sys.executable, "train.py", "--config", WORKLOADS[job.workload].config, *settings]


def their_command(job: Job, folder: Path) -> list[str]:
    options = ["--config", WORKLOADS[job.workload].config, f"--every={job.every}", *job.flags]
    return [sys.executable, "benchmarks/peers/trl_learn.py", "--out", str(folder), *options, *job.overrides()]


def train(job: Job, folder: Path) -> tuple[Result, dict[int, Path]]:
    """Train in a process of its own; return what it took, and {steps: the model that was kept then}."""
    trl = job.method == TRL
    command = (their_command if trl else our_command)(job, folder)
    folder.mkdir(parents=True)
    with (folder / "log").open("w+") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            sys.exit(f"{job.method} failed: {log.read()[-3000:]}")
    if trl:
        lines = read_lines(folder / "steps.jsonl")
        taken = {"seconds": [r["seconds"] for r in lines], "tokens": [r["tokens"] for r in lines]}
        models = folder.glob("step_*")
    else:
        lines = read_lines(folder / "run" / "metrics.jsonl")
        sampled = [int(r["tokens_sampled"]) for r in lines]
        taken = {"seconds": [r["time/step"] for r in lines], "tokens": np.diff([0, *sampled]).tolist()}
        taken["kl"] = [r["kl_divergence"] for r in lines]
        taken["format"] = [r["reward/format"] for r in lines]
        models = (folder / "run" / "checkpoints").glob("step_*")
    taken |= {"cpu_seconds": used.ru_utime + used.ru_stime, "gib": used.ru_maxrss / 2**20}
    return taken, {int(m.name[5:]): m for m in sorted(models, key=lambda m: int(m.name[5:]))}


def read_lines(file: Path) -> list[Result]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def evaluation_config(job: Job) -> Config:
    """Return the configuration of an evaluation: the job's split, and the same random keys for every model."""
    cfg = load_config(ROOT / WORKLOADS[job.workload].config, job.overrides())
    if job.split == "dev":
        cfg.data.test_files = cfg.data.val_files
    cfg.trainer.seed = 0
    return cfg


def judge(model: Path | None, job: Job) -> Result:
    """Sample and score responses of a model to the prompts of the job's split; None: the model training starts from."""
    import eval as evaluation
    from gspo.distributed.world import process_group
    from gspo.metrics.evaluation import report

    cfg = evaluation_config(job)
    with contextlib.redirect_stdout(sys.stderr), process_group() as world:
        full = report(evaluation.evaluate(str(model) if model else cfg.model.path, cfg, world))
    return {key: full[key] for key in ("pass@1", "pass@8", "greedy", "correct_counts")}


def run(job: Job, scratch: Path) -> Result:
    """Train, judge every model that was kept, and return the numbers of the run."""
    folder = scratch / job.key()
    shutil.rmtree(folder, ignore_errors=True)
    taken, models = train(job, folder)
    judged = {step: judge(model, job) for step, model in models.items()}
    shutil.rmtree(folder)
    curves = {name: [r[name] for r in judged.values()] for name in ("pass@1", "pass@8", "greedy")}
    return {**taken, "steps": list(judged), **curves, "correct_counts": [*judged.values()][-1]["correct_counts"]}


class Results:
    """The results of runs, a JSON line each in one file."""

    def __init__(self, file: Path, scratch: Path):
        self.file, self.scratch = file, scratch

    def of(self, job: Job) -> Result:
        """Return the kept result of a job, or that of a new run."""
        for result in read_lines(self.file) if self.file.exists() else []:
            if result["key"] == job.key():
                return result
        print(f"{job.workload}: {job.method}, step size {job.lr:g}, seed {job.seed}", file=sys.stderr, flush=True)
        found = {"start": judge(None, job)} if job.method == "start" else run(job, self.scratch)
        result = {"key": job.key(), **asdict(job), "day": str(datetime.date.today()), **found}
        with self.file.open("a", encoding="utf-8") as f:
            f.write(json.dumps(result) + "\n")  # one write of one line
        return result


# ---- all runs ----


def make_job(name: str, method: str, lr: float, seed: int, split: str, args: argparse.Namespace) -> Job:
    work = WORKLOADS[name]
    own, flags = ((), work.trl) if method == TRL else (work.ours, ())
    settings = (*work.settings, *own, *(FAST if args.fast else ()))
    return Job(name, method, lr, seed, split, args.steps, args.every, settings, flags)


def tune(name: str, results: Results, args: argparse.Namespace) -> tuple[float, dict[float, Result]]:
    """Return TRL's own best step size, and the runs that chose it: {step size: run}.

    It is that of the highest dev accuracy, mean over halfway and the end of a run of half the steps.
    """
    tuning = argparse.Namespace(**vars(args) | {"steps": args.steps // 2, "every": args.steps // 4})
    tried: dict[float, Result] = {}

    def accuracy(lr: float) -> float:
        tried[lr] = results.of(make_job(name, TRL, lr, TUNING_SEED, "dev", tuning))
        return statistics.mean(tried[lr]["pass@1"])

    return climb(args.first or WORKLOADS[name].first, accuracy), tried


def chosen_rate(name: str, method: str, results: Results, args: argparse.Namespace) -> float:
    """Return a contestant's step size."""
    if args.fast or method != TRL or not WORKLOADS[name].search:
        return args.first or WORKLOADS[name].first
    return tune(name, results, args)[0]


def climb(first: float, accuracy: Callable[[float], float]) -> float:
    """Return the step size among first x 2^k whose neighbours, twice and half of it, are both not better."""
    seen = {0: accuracy(first)}
    best = 0
    while True:
        for k in (best + 1, best - 1):
            if k not in seen:
                seen[k] = accuracy(float(f"{first * 2.0**k:.4g}"))
            if seen[k] > seen[best]:
                best = k
                break
        else:
            return float(f"{first * 2.0**best:.4g}")


def compare_search(name: str, args: argparse.Namespace) -> None:
    """Choose TRL's step size, and show the runs that chose it beside one of ours, all on the dev split."""
    results = Results(args.out / "beside_trl.jsonl", ROOT / "outputs" / "beside_trl")
    first = args.first or WORKLOADS[name].first
    start = results.of(make_job(name, "start", first, 0, "dev", args))["start"]
    ours = results.of(make_job(name, OURS, first, TUNING_SEED, "dev", args))
    _, tried = tune(name, results, args)
    runs = {f"{OURS}, step size {first:g}": at_pace(ours, [ours])}
    runs |= {f"{TRL}, step size {lr:g}": at_pace(tried[lr], tried.values()) for lr in sorted(tried)}
    title = heading(f"The search for TRL's step size: {name}", f"python benchmarks/beside_trl.py {name} --search")
    text = "\n".join([title, search_lines(runs, start["pass@1"])])
    (args.out / f"beside_trl_{name}_search.md").write_text(text, encoding="utf-8")
    draw(args.out / f"beside_trl_{name}_search.png", {label: [run] for label, run in runs.items()}, start)
    print(text)


def compare(name: str, methods: Iterable[str], args: argparse.Namespace) -> None:
    """Choose the step sizes, train all seeds, and write the table and the picture."""
    results = Results(args.out / "beside_trl.jsonl", ROOT / "outputs" / "beside_trl")
    start = results.of(make_job(name, "start", WORKLOADS[name].first, 0, "test", args))["start"]
    runs: dict[str, list[Result]] = {}
    for method in methods:
        lr = chosen_rate(name, method, results, args)
        runs[method] = [results.of(make_job(name, method, lr, seed, "test", args)) for seed in range(args.seeds)]
    options = [
        f"--{key}={value}" for key, value in (("steps", args.steps), ("every", args.every), ("seeds", args.seeds))
    ]
    title = heading(f"GSPO beside TRL: {name}", " ".join(["python benchmarks/beside_trl.py", name, *options]))
    text = "\n".join([title, lines_of(runs, start)])
    (args.out / f"beside_trl_{name}.md").write_text(text, encoding="utf-8")
    draw(args.out / f"beside_trl_{name}.png", runs, start)
    print(text)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--fast", action="store_true", help="two small steps of one seed, to see that it works")
    parser.add_argument("--seeds", type=int, help="runs of each (default: 3)")
    parser.add_argument("--steps", type=int, help="steps a run (default: the workload's)")
    parser.add_argument("--every", type=int, help="steps between evaluations (default: the workload's)")
    parser.add_argument("--first", type=float, help="our step size, and the first that is tried of TRL's")
    parser.add_argument("--search", action="store_true", help="only choose TRL's step size: a run of ours beside those")
    parser.add_argument("--only", choices=("ours", "trl"), help="only this contestant")
    parser.add_argument("--out", type=Path, help="folder of results and tables (default: benchmarks/)")
    args = parser.parse_args()
    work = WORKLOADS[args.workload]
    steps, every, seeds = (2, 1, 1) if args.fast else (work.steps, work.every, 3)
    args.steps, args.every = args.steps or steps, args.every or every
    args.seeds = seeds if args.seeds is None else args.seeds
    if args.seeds < 1 or args.every < 1 or args.steps % args.every:
        parser.error("--seeds and --every: at least 1, and --steps a multiple of --every.")
    if args.search and (args.fast or not work.search):
        parser.error(f"--search: not with --fast, and no step size is searched for {args.workload}.")
    args.out = (args.out or (ROOT / "outputs" / "beside_trl_fast" if args.fast else HERE)).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def write_rows(name: str) -> None:
    """Write the splits of a workload's task."""
    import importlib

    importlib.import_module(f"gspo.embedded.{name}").write_splits(ROOT / "data" / name)


def main() -> None:
    args = options()
    os.chdir(ROOT)
    write_rows(args.workload)
    if args.search:
        return compare_search(args.workload, args)
    names = {"ours": OUR_NAMES[args.workload], "trl": TRL}
    compare(args.workload, [name for key, name in names.items() if args.only in (None, key)], args)
    return None


if __name__ == "__main__":
    main()

"""Run the trainings of learning.py, several at a time, and keep the result of each as a line of a file.

A run is told apart by its settings alone: the same command goes on where it stopped, on another day and another machine
as well. Each line says by which code and on which day it was made.
"""

import contextlib
import datetime
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training run, and whether the test prompts are answered at its end."""

    task: str
    method: str
    lr: float
    kl_coef: float
    seed: int
    settings: tuple[str, ...]
    tested: bool

    def key(self) -> str:
        """Return what tells this run from others: a hash of its settings."""
        return hashlib.sha256(json.dumps([*self.settings, self.tested]).encode()).hexdigest()[:16]


class Results:
    """The results of runs, a JSON line each in one file, to which several processes may append."""

    def __init__(self, file: Path):
        self.file = file

    def find(self, job: Job) -> Result | None:
        """Return the result of a run that was made before, if there is one."""
        if not self.file.exists():
            return None
        for line in self.file.read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            if result["key"] == job.key():
                return result
        return None

    def add(self, job: Job, result: Result) -> Result:
        """Append a result, and return it with what it is told apart by."""
        kept = {
            **{"key": job.key(), "task": job.task, "method": job.method, "lr": job.lr, "kl_coef": job.kl_coef},
            **{"seed": job.seed, "settings": list(job.settings), "code": code_version()},
            **{"day": str(datetime.date.today()), **result},
        }
        with self.file.open("a", encoding="utf-8") as f:
            f.write(json.dumps(kept) + "\n")  # one write of one line
        return kept


def code_version() -> str:
    """Return a hash of the code and the models that a result depends on."""
    digest = hashlib.sha256()
    parts = ["train.py", "configs/quick.yaml", "benchmarks/*_reward.py", "gspo/**/*.py", "gspo/**/*.safetensors"]
    for file in sorted(file for part in parts for file in ROOT.glob(part)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def result_of(job: Job, results: Results, scratch: Path) -> Result:
    """Return the kept result of a job, or that of a new run."""
    return results.find(job) or results.add(job, train_once(job, scratch / job.key()))


def train_once(job: Job, folder: Path) -> Result:
    """Train in this process, answer the test prompts if the job says so, and return the numbers of the run."""
    import torch

    import train
    from gspo.distributed.world import process_group
    from gspo.read_config import load_config

    torch.manual_seed(0)
    shutil.rmtree(folder, ignore_errors=True)
    where = [f"trainer.output_dir={folder.parent}", f"trainer.run_name={folder.name}", "trainer.keep_best=false"]
    cfg = load_config(ROOT / "configs/quick.yaml", [*job.settings, *where])
    began, cpu_before = time.monotonic(), cpu_seconds()
    folder.mkdir(parents=True)
    with (folder / "log").open("w") as log, contextlib.redirect_stdout(log), process_group() as world:
        train.train(cfg, world)
        spent = {"seconds": time.monotonic() - began, "cpu_seconds": cpu_seconds() - cpu_before}
        tested = test_answers(cfg, folder / "checkpoints", world) if job.tested else {}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [r for r in rows if "heldout/accuracy" in r]
    shutil.rmtree(folder)
    return {
        **{name: round(value, 1) for name, value in spent.items()},
        **tested,
        "length": rows[-1].get("response/length_mean"),  # None: nothing is sampled
        "kl": evaluated[-1]["kl_to_initial"],
        "tokens": [int(r["tokens_sampled"]) for r in evaluated],
        "dev": [r["heldout/accuracy"] for r in evaluated],
        "dev_kl": [r["kl_to_initial"] for r in evaluated],
    }


def test_answers(cfg: Any, model: Path | None, world: Any) -> Result:
    """Sample and score responses to the test prompts by a checkpoint, or by the model that training starts from."""
    import eval as evaluation
    from gspo.checkpoint.find_runs import latest_checkpoint
    from gspo.metrics.evaluation import report

    name = str(latest_checkpoint(model)) if model else cfg.model.path
    full = report(evaluation.evaluate(name, cfg, world))
    return {key: full[key] for key in ("pass@1", "pass@8", "greedy", "reward_mean", "correct_counts")}


def before_training(settings: list[str]) -> Result:
    """Return the accuracies on the test prompts of the model that training starts from."""
    from gspo.distributed.world import process_group
    from gspo.read_config import load_config

    with process_group() as world:
        return test_answers(load_config(ROOT / "configs/quick.yaml", settings), None, world)


def cpu_seconds() -> float:
    """Return the processor time that this process and its ended children have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


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


def in_parallel(work: Callable[..., Any], calls: Iterable[tuple], label: str) -> dict[tuple, Any]:
    """Make all calls of a function, as many at a time as there are cores; return {arguments: result}."""
    from gspo.system.console import track

    available = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    )
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for core in available:
        cores.put(core)
    found = {}
    with ProcessPoolExecutor(len(available), context, claim_core, (cores,)) as pool:
        waiting = {pool.submit(work, *arguments): arguments for arguments in calls}
        try:
            for done in track(as_completed(waiting), label, total=len(waiting)):
                found[waiting[done]] = done.result()
        except KeyboardInterrupt:
            print("interrupted; the same command goes on with the runs that are not done", file=sys.stderr, flush=True)
            os._exit(130)  # the workers follow
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found

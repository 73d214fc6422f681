"""A run that is killed again and again ends as if nobody had touched it; so does one that is asked to leave.

Its reward function forks, starts processes in sessions of their own and sleeps, so that kills hit it, too.
"""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from processes import Program, wait_until
from safetensors.torch import load_file

SMALL = ("--config", "configs/quick.yaml", "data.train_batch_size=4", "rollout.max_new_tokens=12",
         "eval.before_and_after=false", "eval.round_prompts=4", "eval.freq=3", "trainer.save_freq=2",
         "optim.learning_rate=1e-3", "reward.workers=2", "reward.check_rows=0")  # fmt: skip
STEPS = {3: 24, 25: 160}  # kills -> so many that the run does not end before it has been killed so often
MOMENTS = ("saving", "step", "starting", "saving")  # of one kill after the other
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SLEEPER = "sleep 86399"  # what the reward function starts, found by its name
REWARD = f"""
import os, subprocess, time, zlib

left = 3  # processes that each worker starts

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    global left
    draw = zlib.crc32(f"{{solution_str}} {{ground_truth}}".encode()) % 8
    if draw < 2 and left:
        left -= 1
        if draw:
            subprocess.Popen({SLEEPER.split()!r}, start_new_session=True)
        elif os.fork() == 0:
            os.setsid()
            os.execvp("sleep", {SLEEPER.split()!r})
    time.sleep(0.02 * draw)
    return float(solution_str.endswith(ground_truth))
"""

pytestmark = pytest.mark.timeout(1500)
kills_of_each_length = pytest.mark.parametrize(
    "kills",
    [pytest.param(3, marks=pytest.mark.slow), pytest.param(25, marks=[pytest.mark.hour, pytest.mark.timeout(10_000)])],
)


def command(folder: Path, steps: int, ranks: int):
    launcher = TORCHRUN if ranks == 2 else ()
    (folder / "reward.py").write_text(REWARD)
    mine = (f"trainer.max_steps={steps}", f"trainer.output_dir={folder}", f"reward.path={folder / 'reward.py'}")
    return (*launcher, "train.py", *SMALL, *mine)


def start(folder: Path, *args) -> Program:
    (folder / "scratch").mkdir(exist_ok=True)
    return Program(*args, log=folder / "log", env={"TMPDIR": str(folder / "scratch")})


def run_through(folder: Path, steps: int, ranks: int) -> None:
    program = start(folder, *command(folder, steps, ranks))
    assert program.ended(10 * steps + 300) == 0, (folder / "log").read_text()[-3000:]
    assert program.orphans() == {}


def rows(folder: Path, name: str = "metrics"):
    return [json.loads(line) for line in (folder / "quick" / f"{name}.jsonl").read_text().splitlines()]


def lines(folder: Path) -> int:
    file = folder / "quick" / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def newest(folder: Path) -> str:
    return max((p.name for p in (folder / "quick" / "checkpoints").glob("step_*[0-9]")), default="")


def is_saving(folder: Path) -> bool:
    return any((folder / "quick" / "checkpoints").glob("step_*.part/**/*.safetensors"))


def wait_for(moment: str, draw: random.Random, program: Program, folder: Path) -> None:
    """Wait for a moment to kill at: while it starts, in a step, or while it saves.

    The last two let it come a checkpoint further than it was, or no number of restarts would be enough.
    """
    before = newest(folder)
    ended = lambda: program.process.poll() is not None  # noqa: E731
    if moment == "starting":
        time.sleep(draw.uniform(0.0, 8.0))
        return
    wait_until(lambda: ended() or newest(folder) > before)
    if moment == "step":
        time.sleep(draw.uniform(0.0, 1.0))
    else:
        wait_until(lambda: ended() or is_saving(folder), every_s=0.0005)
        time.sleep(draw.choice([0.0, draw.uniform(0.0, 0.1)]))


def kill_again_and_again(folder: Path, steps: int, ranks: int, kills: int) -> Counter:
    """So often: start, SIGKILL at a random moment; with two ranks torchrun itself or one of its workers.

    Return how often which moment and victim were hit, and how many processes of the reward function there were.
    """
    draw, done = random.Random(ranks), Counter()
    for k in range(kills):
        program, moment = start(folder, *command(folder, steps, ranks)), MOMENTS[k % len(MOMENTS)]
        wait_for(moment, draw, program, folder)
        alive = program.alive()
        workers = [pid for pid, args in alive.items() if "train.py" in args and pid != program.process.pid]
        victim = draw.choice(workers) if workers and (k + k // len(MOMENTS)) % 2 else program.process.pid
        is_running = program.process.poll() is None
        program.kill(victim)
        assert program.orphans() == {}
        assert is_running, "it ended before it was killed often enough: more steps are needed"
        done[f"{moment}, {'a worker' if victim in workers else 'the first process'}"] += 1
        done["processes of the reward function"] += sum(SLEEPER in args for args in alive.values())
    run_through(folder, steps, ranks)
    return done


def assert_nothing_is_left(folder: Path) -> None:
    assert [p for p in folder.rglob("*") if ".part" in p.name or ".damaged" in p.name] == []
    left = [p.name for p in (folder / "scratch").iterdir()]
    assert [name for name in left if not name.startswith("torch")] == [], "but torchrun's logs and torch's cache"


def final(folder: Path, steps: int):
    step = folder / "quick" / "checkpoints" / f"step_{steps:06d}"
    return {str(file.relative_to(step)): load_file(file) for file in sorted(step.rglob("*.safetensors"))}


def whole_and_killed(tmp_path: Path, capsys, ranks: int, kills: int) -> tuple[Path, Path]:
    """Train once without and once with so many kills; return both folders."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    done = kill_again_and_again(killed, STEPS[kills], ranks, kills)
    run_through(whole, STEPS[kills], ranks)
    with capsys.disabled():
        print(dict(done))
    assert done["processes of the reward function"] > 0, "they were there to be ended"
    assert_nothing_is_left(killed)
    return whole, killed


@kills_of_each_length
def test_kills_on_one_process_leave_every_bit_as_it_would_have_been(tmp_path, capsys, kills):
    whole, killed = whole_and_killed(tmp_path, capsys, 1, kills)
    mine, theirs = final(killed, STEPS[kills]), final(whole, STEPS[kills])
    assert mine.keys() == theirs.keys()
    for file in mine:
        for name, x in theirs[file].items():
            assert mine[file][name].equal(x), (file, name)
    kept = ("step", "reward_mean", "loss/total", "grad_norm", "kl_divergence", "round", "heldout/accuracy")
    curves = [[{k: r[k] for k in kept if k in r} for r in rows(folder)] for folder in (killed, whole)]
    assert curves[0] == curves[1] and len(curves[0]) == STEPS[kills]
    assert rows(killed, "samples") == rows(whole, "samples")
    best = [(folder / "quick/checkpoints/best").resolve().name for folder in (killed, whole)]
    assert best[0] == best[1]


@kills_of_each_length
def test_kills_on_two_ranks_leave_the_weights_within_float_tolerance(tmp_path, capsys, kills):
    """Gradients are summed in an order that may change; torchrun and its workers are killed alike."""
    whole, killed = whole_and_killed(tmp_path, capsys, 2, kills)
    mine, theirs = final(killed, STEPS[kills]), final(whole, STEPS[kills])
    assert mine.keys() == theirs.keys() and len(mine) >= 7
    for file in mine:
        for name, x in theirs[file].items():
            torch.testing.assert_close(mine[file][name], x, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert [r["step"] for r in rows(killed)] == [*range(1, STEPS[kills] + 1)]


@pytest.mark.slow
def test_torchrun_restarts_a_worker_that_died_and_the_run_goes_on_by_itself(tmp_path):
    args = command(tmp_path, 12, 2)
    program = start(tmp_path, *args[:4], "--max-restarts=2", *args[4:], "trainer.resume=never")
    assert wait_until(lambda: newest(tmp_path) >= "step_000004")
    workers = [pid for pid, line in program.alive().items() if "train.py" in line and pid != program.process.pid]
    program.kill(max(workers))
    assert program.ended() == 0, (tmp_path / "log").read_text()[-3000:]
    assert program.orphans() == {} and [r["step"] for r in rows(tmp_path)] == [*range(1, 13)]
    said = (tmp_path / "log").read_text()
    assert "of 12 steps done" in said and "the earlier run is kept as" not in said
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("to", ["a worker", "torchrun"])
@pytest.mark.slow
def test_a_signal_to_one_is_a_signal_to_all_ranks(tmp_path, to):
    """Two ranks end their step, save, and leave; torchrun passes SIGTERM on."""
    program = start(tmp_path, *command(tmp_path, 1000, 2))
    assert wait_until(lambda: lines(tmp_path) >= 3)
    workers = [pid for pid, line in program.alive().items() if "train.py" in line and pid != program.process.pid]
    number = signal.SIGUSR1 if to == "a worker" else signal.SIGTERM
    for pid in workers[-1:] if to == "a worker" else [program.process.pid]:
        os.kill(pid, number)
    code = program.ended()
    assert code == 0 or to == "torchrun", "torchrun reports the signal that it got"
    assert program.orphans() == {} and f"{number.name}: left after step " in (tmp_path / "log").read_text()
    assert newest(tmp_path) == f"step_{lines(tmp_path):06d}"
    assert_nothing_is_left(tmp_path)

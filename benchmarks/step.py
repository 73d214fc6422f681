"""Measure a whole training step, from sampling to optimizer, beside TRL's GRPOTrainer: seconds, peak memory, floor.

    python benchmarks/step.py [--cases NAME ...] [--steps K] [--peers PYTHON]

Each contestant trains in a process of its own, ours with `train.py`: one optimizer step a batch, a reference model, the
same prompts, temperature 0.9, a reward that takes microseconds. A step is the time between two `step` lines of a
process: it includes logging, but not the start; the first step is left out, and the median counts (on some machines the
next two still touch memory for the first time). Peak memory is the resident set size.

The floor is the matrix products of the same work with each prompt computed once: 2 F a token in sampling, 2 F under the
reference and 6 F in the update, where F is the number of weights that a token is multiplied by, at the rate of matrix
products alone with the model's own shapes, measured between the contestants.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import heading, table
from gspo.embedded import MODEL_DIR
from gspo.models.loading import load_model_config, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
TEMPLATE = (
    "A farmer has {} boxes with {} apples in each. He gives {} apples to each of his {} friends. How many are left?"
)
SHOP = "Example {}: a shop sells {} pens at {} coins each, so they cost {} coins together. "


@dataclass(frozen=True)
class Case:
    """One workload. `context`: worked examples before each question; `rows`: responses that TRL trains on at a time,
    where all at once do not fit 24 GB."""

    model: Path
    precision: str
    prompts: int
    n: int
    new: int
    micro_batch_tokens: int
    steps: int
    context: int = 0
    rows: int | None = None


CASES = {
    "SmolLM2-135M, fp32, short prompts": Case(SMOLLM2, "fp32", 4, 8, 64, 2400, 4),
    "SmolLM2-135M, bf16, short prompts": Case(SMOLLM2, "bf16", 4, 8, 64, 2400, 9),
    "SmolLM2-135M, fp32, 512-token prompts": Case(SMOLLM2, "fp32", 4, 8, 64, 1100, 3, context=17, rows=8),
    "SmolLM2-135M, bf16, 512-token prompts": Case(SMOLLM2, "bf16", 4, 8, 64, 1100, 3, context=17, rows=8),
    "0.6 M parameters, fp32": Case(MODEL_DIR, "fp32", 64, 4, 14, 16384, 40),
}


def write_rows(case: Case, folder: Path) -> tuple[Path, float]:
    """Write a data file and return it with the mean number of tokens of its prompts, chat template included."""
    before = "".join(SHOP.format(k, k + 2, k + 3, (k + 2) * (k + 3)) for k in range(case.context))
    if case.model == SMOLLM2:
        texts = [before + TEMPLATE.format(i + 9, 2 * i + 5, i + 1, i % 4 + 2) for i in range(64)]
    else:
        texts = [f"Solve: {i % 9 + 2}x + {i} = {(i % 9 + 2) * (i % 7) + i}" for i in range(256)]
    path = folder / "rows.json"
    path.write_text(json.dumps([{"prompt": t, "ground_truth": "1", "data_source": "timing"} for t in texts]))
    tokenizer = load_tokenizer(str(case.model))
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": t}], tokenize=False) for t in texts]
    return path, statistics.mean(len(tokenizer(chat)["input_ids"]) for chat in chats)


def ours(case: Case, rows: Path, steps: int, folder: Path, python: str) -> list[str]:
    overrides = {
        "model.path": case.model,
        "model.precision": case.precision,
        "data.train_files": f"[{rows}]",
        "data.train_batch_size": case.prompts,
        "data.shuffle": "false",
        "rollout.n": case.n,
        "rollout.max_new_tokens": case.new,
        "selfplay.rounds": 1,
        "reward.path": ROOT / "benchmarks" / "step_reward.py",
        "reward.check_rows": 0,
        "objective.margin": 0.0,
        "optim.learning_rate": 1e-6,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "optim.epochs_per_rollout": 1,
        "optim.minibatches": 1,
        "optim.micro_batch_tokens": case.micro_batch_tokens,
        "eval.before_and_after": "false",
        "eval.round_prompts": 0,
        "trainer.max_steps": steps,
        "trainer.save_freq": 0,
        "trainer.resume": "never",
        "trainer.output_dir": folder,
        "trainer.run_name": "run",
    }
    settings = [f"{key}={value}" for key, value in overrides.items()]
    return [python, str(ROOT / "train.py"), "--config", str(ROOT / "configs" / "quick.yaml"), *settings]


def trl(case: Case, rows: Path, steps: int, folder: Path, python: str) -> list[str]:
    rows_at_once = case.rows or case.prompts * case.n
    numbers = {"prompts": case.prompts, "n": case.n, "new": case.new, "steps": steps, "rows_at_once": rows_at_once}
    flags = [f"--{name}={value}" for name, value in numbers.items()]
    flags += ["--bf16"] * (case.precision == "bf16")
    return [python, str(ROOT / "benchmarks" / "peers" / "trl_step.py"), str(case.model), str(rows), *flags]


def our_length(folder: Path, _: str) -> float:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return statistics.mean(json.loads(line)["response/length_mean"] for line in lines)


def their_length(_: Path, last_line: str) -> float:
    return json.loads(last_line)["length"]


CONTESTANTS: dict[str, tuple[Callable, Callable]] = {"TRL GRPOTrainer": (trl, their_length), "GSPO": (ours, our_length)}


def run(name: str, case: Case, steps: int, python: str) -> dict:
    """Train and return the seconds of each step after the first, the peak GiB, and the mean tokens a response."""
    command, length = CONTESTANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows, _ = write_rows(case, folder)
        errors = (folder / "stderr").open("w+")
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
        child = subprocess.Popen(
            command(case, rows, steps, folder, python),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        stamps, last = [], ""
        for line in child.stdout:
            if line.startswith("step "):  # some print `step 3/10`, and not every step
                stamps.append((time.perf_counter(), int(line.split()[1].partition("/")[0])))
            last = line.strip() or last
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            sys.exit(f"{name} failed: {errors.read()[-2000:]}")
        seconds = [(b - a) / (k - j) for (a, j), (b, k) in zip(stamps, stamps[1:], strict=False)]
        return {"seconds": seconds, "gib": used.ru_maxrss / 2**20, "length": length(folder, last)}


def bare_rate(case: Case) -> float:
    """Return the FLOP/s of products [tokens, D] @ [D, F] with the model's own shapes, the best of three runs."""
    c = load_model_config(str(case.model)).get_text_config()
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    a = torch.randn(case.micro_batch_tokens, c.hidden_size, dtype=dtype)
    b = torch.randn(c.hidden_size, c.intermediate_size, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 20 * a.shape[0] * b.numel() / best


def floor_flops(case: Case, prompt: float, length: float) -> float:
    """Return the operations of one step: the layers once for every token, the head for response tokens."""
    c = load_model_config(str(case.model)).get_text_config()
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    attention = 2 * c.hidden_size * head * (c.num_attention_heads + c.num_key_value_heads)
    layers = c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    answers = case.prompts * case.n * length
    return (2 + 2 + 6) * (layers * (case.prompts * prompt + answers) + c.vocab_size * c.hidden_size * answers)


def measure(name: str, case: Case, args: argparse.Namespace) -> list[list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        prompt = write_rows(case, Path(folder))[1]
    results, rates = {}, [bare_rate(case)]
    for contestant in CONTESTANTS:
        python = sys.executable if contestant == "GSPO" else args.peers
        results[contestant] = run(contestant, case, args.steps or case.steps, python)
        rates.append(bare_rate(case))
        print(f"{name}: {contestant}: {results[contestant]}", file=sys.stderr, flush=True)
    rate, baseline = statistics.median(rates), results["TRL GRPOTrainer"]
    rows = []
    for contestant, said in results.items():
        seconds = statistics.median(said["seconds"])
        floor = floor_flops(case, prompt, said["length"]) / rate
        times, memory = statistics.median(baseline["seconds"]) / seconds, said["gib"] / baseline["gib"]
        row = [f"{seconds:.3g}", f"{times:.2f}x", f"{floor:.3g}", f"{floor / seconds:.0%}", f"{said['gib']:.2f}"]
        rows.append([name, f"{prompt:.0f}", contestant, *row, f"{memory:.2f}", f"{said['length']:.1f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="default: all")
    parser.add_argument("--steps", type=int, help="steps a contestant (default: 3 to 40); the first is not counted")
    parser.add_argument("--peers", default=sys.executable, help="a Python that has trl installed (default: this one)")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 2:
        parser.error("--steps: at least 2, since the first is not counted")
    rows = [row for name in args.cases for row in measure(name, CASES[name], args)]
    options = [] if args.cases == list(CASES) else ["--cases", *args.cases]  # without the path of --peers
    columns = ["", "prompt tokens", "", "seconds a step", "times as fast", "floor, s", "floor / time", "peak GiB"]
    title = heading("A whole training step", shlex.join(["python", "benchmarks/step.py", *options]))
    print(title)
    print(table([*columns, "of TRL's", "tokens an answer"], rows))


if __name__ == "__main__":
    main()

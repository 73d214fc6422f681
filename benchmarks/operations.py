"""Compare the linear log-prob with other ways to compute it: seconds, GFLOP/s, peak memory.

    python benchmarks/operations.py [--tokens 2048 --size 896 --vocabulary 151936 --dtype float32 --device cpu]

Every contestant runs in a process of its own: log-probs of T tokens at temperature 0.9, and the gradients of their sum
weighted with given coefficients. The floor is measured in the same process, before and after: the three matrix products
that cannot be avoided (6 T D V), on a part of the vocabulary. With one CPU thread (OMP_NUM_THREADS=1) the process's own
CPU time is counted, so other processes do not change it. Contestants that are not installed, or fail, are named.
"""

import argparse
import ctypes
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import heading, table
from gspo.kernels.ops import linear_logprob, linear_logprob_and_grad, reference_linear_logprob

TEMPERATURE = 0.9
PIECE = 256  # tokens at a time, for contestants that cut the tokens
STATUS = Path("/proc/self/status")

# Each takes (hidden, weight, targets, coefficients) and returns a loss to call backward on.


def plain(hidden, weight, targets, coefficients):
    return (coefficients * reference_linear_logprob(hidden, weight, targets, temperature=TEMPERATURE)).sum()


def torch_chunked(hidden, weight, targets, coefficients):
    options = torch.nn.LinearCrossEntropyOptions()
    losses = F.linear_cross_entropy(hidden / TEMPERATURE, weight, targets, reduction="none", options=options)
    return -(coefficients * losses).sum()


@torch.compile
def compiled_piece(hidden, weight, targets):
    return reference_linear_logprob(hidden, weight, targets, temperature=TEMPERATURE)


def compiled_chunked(hidden, weight, targets, coefficients):
    pieces = zip(hidden.split(PIECE), targets.split(PIECE), strict=True)
    parts = [checkpoint(compiled_piece, h, weight, t, use_reentrant=False) for h, t in pieces]
    return (coefficients * torch.cat(parts)).sum()


def trl(hidden, weight, targets, coefficients):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    chunk = 8192  # vocabulary entries, its trainer's choice
    logprobs = ChunkedLogProbFunction.apply(hidden, weight, None, targets, TEMPERATURE, chunk, None, 1.0, ())[0]
    return (coefficients * logprobs).sum()


def liger(hidden, weight, targets, coefficients):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden / TEMPERATURE, targets)


def cut_cross_entropy(hidden, weight, targets, coefficients):
    from cut_cross_entropy import linear_cross_entropy

    return -(coefficients * linear_cross_entropy(hidden / TEMPERATURE, weight, targets, reduction="none")).sum()


def ours(hidden, weight, targets, coefficients):
    return (coefficients * linear_logprob(hidden, weight, targets, temperature=TEMPERATURE)).sum()


def ours_known(hidden, weight, targets, coefficients):
    return linear_logprob_and_grad(
        hidden, weight, targets, lambda logprob, rows: coefficients[rows], temperature=TEMPERATURE
    )[0]


CONTESTANTS: dict[str, tuple[Callable, str]] = {
    "plain logits and log-softmax": (plain, ""),
    "torch linear_cross_entropy, chunked": (torch_chunked, ""),
    "chunks of tokens, compiled, checkpointed": (compiled_chunked, ""),
    "TRL chunked_logprob": (trl, "trl"),
    "Liger fused linear cross-entropy (one sum)": (liger, "liger_kernel"),
    "cut-cross-entropy": (cut_cross_entropy, "cut_cross_entropy"),
    "linear_logprob": (ours, ""),
    "linear_logprob_and_grad": (ours_known, ""),
}


def draw(args: argparse.Namespace) -> list[Tensor]:
    g = torch.Generator(args.device).manual_seed(0)
    options = {"generator": g, "device": args.device, "dtype": getattr(torch, args.dtype)}
    hidden = torch.randn(args.tokens, args.size, **options)
    weight = torch.randn(args.vocabulary, args.size, **options).mul_(3 / args.size**0.5)
    targets = torch.randint(args.vocabulary, (args.tokens,), generator=g, device=args.device)
    coefficients = torch.randn(args.tokens, generator=g, device=args.device)
    return [hidden.requires_grad_(), weight.requires_grad_(), targets, coefficients]


def now(device: str) -> float:
    """Return the time once all queued work is done: wall-clock, or this process's CPU time with one CPU thread."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def bare_rate(hidden: Tensor, weight: Tensor) -> float:
    """Return the FLOP/s of the three products on a part of the vocabulary, each the best of three runs."""
    x, w = hidden.detach(), weight.detach()[: 16384 if weight.is_cuda else 4096]
    z, dx, dw = x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)
    products = ((x, w.t(), z), (z, w, dx), (z.t(), x, dw))
    best = [float("inf")] * 3
    for _ in range(3):
        for k, (a, b, out) in enumerate(products):
            began = now(x.device.type)
            torch.mm(a, b, out=out)
            best[k] = min(best[k], now(x.device.type) - began)
    return 6 * z.numel() * x.shape[1] / sum(best)


def run(step: Callable, inputs: list[Tensor]) -> tuple[float, float]:
    """Return the seconds of one forward and of one backward."""
    device = inputs[0].device.type
    for x in inputs[:2]:
        x.grad = None
    began = now(device)
    loss = step(*inputs)
    middle = now(device)
    loss.backward()
    return middle - began, now(device) - middle


def resident(key: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes; 0 where the system does not tell."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def begin_peak(device: str) -> int:
    """Return the bytes in use, and start counting the peak from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if STATUS.exists():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def added_product(total: tuple, a: tuple, b: tuple, *_, **__) -> int:
    """Return the operations of total += a @ b from shapes; torch counts only the form that is not in place."""
    return 2 * a[0] * a[1] * b[1]


def measure(name: str, args: argparse.Namespace) -> dict:
    """Measure one contestant in this process: one run for peak memory and operations, then the timed runs."""
    step, inputs = CONTESTANTS[name][0], draw(args)
    rates = [bare_rate(*inputs[:2])]
    in_place = {torch.ops.aten.addmm_: added_product}
    counter = nullcontext() if step is compiled_chunked else FlopCounterMode(display=False, custom_mapping=in_place)
    before = begin_peak(args.device)
    with counter:
        times = [run(step, inputs)]
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else resident("VmHWM")
    times = [run(step, inputs) for _ in range(args.repeats)] or times
    rates.append(bare_rate(*inputs[:2]))
    forward, backward = (statistics.median(t) for t in zip(*times, strict=True))
    return {
        "forward": forward,
        "backward": backward,
        "rate": sum(rates) / 2,
        "extra": peak - before - inputs[0].nbytes - inputs[1].nbytes,
        "work": None if step is compiled_chunked else counter.get_total_flops(),
    }


def row(name: str, args: argparse.Namespace, said: dict) -> list[str]:
    unit = args.tokens * args.size * args.vocabulary
    total = said["forward"] + said["backward"]
    times = [f"{x:.3g}" for x in (said["forward"], said["backward"], total)]
    executed = ["-", "-"]
    if said["work"]:
        executed = [f"{said['work'] / unit:.2f}", f"{said['work'] / total / said['rate']:.0%}"]
    rate = f"{said['rate'] / 1e9:,.0f}"
    return [name, *times, *executed, rate, f"{6 * unit / total / said['rate']:.0%}", f"{said['extra'] / 1e6:,.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    cuda = parser.parse_known_args()[0].device == "cuda"
    parser.add_argument("--tokens", type=int, default=4096 if cuda else 2048)
    parser.add_argument("--size", type=int, default=4096 if cuda else 896)
    parser.add_argument("--vocabulary", type=int, default=131_072 if cuda else 151_936)
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--repeats", type=int, default=10 if cuda else 1, help="timed runs after the first")
    parser.add_argument("--among", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="default: all")
    parser.add_argument("--only", choices=CONTESTANTS, help="measure one in this process and print JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    rows = []
    for name in args.among:
        package = CONTESTANTS[name][1]
        if package and find_spec(package) is None:
            print(f"{name}: not installed", file=sys.stderr)
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            rows.append([name, *["-"] * 7, done.stderr.strip().splitlines()[-1][:80]])
        else:
            rows.append(row(name, args, json.loads(done.stdout.splitlines()[-1])))
        print(f"{name}: {rows[-1][1:]}", file=sys.stderr)
    shape = f"T {args.tokens:,}, D {args.size:,}, V {args.vocabulary:,}, {args.dtype}"
    what = f"{torch.cuda.get_device_name()}" if cuda else f"{torch.get_num_threads()} threads"
    title = f"Linear log-prob: {shape}, {what}"
    print(heading(title, shlex.join(["python", "benchmarks/operations.py", *sys.argv[1:]]), ("torch",)))
    columns = [
        "",
        "forward, s",
        "backward, s",
        "both, s",
        "executed, T D V",
        "its rate / bare",
        "bare products, GFLOP/s",
    ]
    print(table([*columns, "6 T D V at the bare rate / time", "peak MB above both gradients"], rows))


if __name__ == "__main__":
    main()

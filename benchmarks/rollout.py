"""Measure tokens per second of the sampler beside transformers' own, and its share of what matrix products allow.

    python benchmarks/rollout.py [MODEL] [--prompt_tokens 51 512] [--new_tokens 64]        (make bench)
    python benchmarks/rollout.py --device cuda                                             (gpu_day.sh)

8 prompts x 8 samples, all of one length, then 16 x 8 whose lengths have a long tail. Prompts are random tokens, end
tokens are switched off and lengths are fixed, so that all do the same work. The floor is the time of the model's linear
layers alone, over the same tokens, measured in this process before and after. rollout_cuda.py measures on CUDA. With
one CPU thread (OMP_NUM_THREADS=1) the process's own CPU time is counted, so other processes do not change it.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gspo  # isort: skip  # noqa: F401  before torch: how its threads wait
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from benchmarks.common import heading, table
from benchmarks.rollout_contestants import (
    PROMPTS,
    TAIL_PROMPTS,
    TAIL_SLOTS,
    N,
    draw,
    generate,
    generate_batch,
    ours,
    seconds,
)
from gspo.models.loading import load_model, load_tokenizer
from gspo.rollout.sampler import Sampler
from gspo.types import Prompt


def floor(model: nn.Module, rows: list[int]) -> float:
    """Return the seconds of all linear layers over `rows` tokens a batch, and of the head over the last 64 of them."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    total, known = 0.0, {}
    for count in rows:
        if count not in known:
            inputs = {m.in_features: torch.randn(count, m.in_features).to(head.weight) for m in [*layers, head]}

            def once(inputs: dict[int, Tensor] = inputs) -> None:
                for m in layers:
                    m(inputs[m.in_features])
                head(inputs[head.in_features][-64:])

            once()
            known[count] = min(seconds(once) for _ in range(3))
        total += known[count]
    return total


def ours_static(sampler: Sampler, prompts: list[Prompt], lengths: Tensor, rows: int) -> None:
    """Sample with our engine without refills: a batch of `rows` responses takes as long as its longest."""
    count = rows // lengths.shape[1]
    for at in range(0, len(prompts), count):
        part = lengths[at : at + count]
        ours(sampler, prompts[at : at + count], torch.full_like(part, int(part.max())), rows)


def long_tail(count: int, longest: int) -> Tensor:
    """Return log-normal lengths [count, N], median longest / 16, sigma 1, at most `longest`: most short, a few long."""
    g = torch.Generator().manual_seed(0)
    drawn = longest / 16 * torch.randn(count, N, generator=g).exp()
    return drawn.round().clamp(1, longest).long()


def compare(
    title: str, contestants: dict[str, Callable], prompts: list[Prompt], lengths: Tensor, rows: int, repeats: int,
    steps: list[int], model: nn.Module,
) -> str:  # fmt: skip
    """Time every contestant on the same work and return a table; `steps`: the tokens of each forward of the floor."""
    tokens, lines, rates = int(lengths.sum()), [], {}
    least = floor(model, steps)
    for name, run in contestants.items():
        try:
            run(prompts[:1], torch.full((1, 2), 2), 2)
            rates[name] = tokens / seconds(partial(run, prompts, lengths, rows), repeats)
        except Exception as e:  # a contestant that does not run here: the table says why
            lines.append([name, "-", "-", f"{type(e).__name__}: {e}".splitlines()[0][:80]])
            continue
        print(f"{title}, {name}: {rates[name]:.0f} tokens/s", file=sys.stderr)
        lines.append([name, f"{rates[name]:.0f}", f"{rates[name] / next(iter(rates.values())):.1f}"])
    least = (least + floor(model, steps)) / 2
    for line in lines:
        line += [f"{rates[line[0]] * least / tokens:.0%}"] if line[0] in rates else []
    lines.append(["linear layers alone", f"{tokens / least:.0f}", "", "100%"])
    return table([title, "tokens/s", "ratio", "share of the linear layers' rate"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="models/SmolLM2-135M-Instruct", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--prompt_tokens", type=int, nargs="+", help="default: 51 512 (CUDA: 256)")
    parser.add_argument("--new_tokens", type=int, help="default: 64 (CUDA: 512)")
    parser.add_argument("--longest", type=int, default=256, help="longest response of the long tail; 0: leave it out")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="contestants to leave out")
    args = parser.parse_args()
    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("no CUDA device here")
        from benchmarks import rollout_cuda

        return rollout_cuda.main(args)
    args.prompt_tokens, args.new_tokens = args.prompt_tokens or [51, 512], args.new_tokens or 64
    model = load_model(args.model, getattr(torch, args.dtype))
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    sampler = Sampler(model, load_tokenizer(args.model), torch.device("cpu"))
    sampler.end_ids = set()
    known = {
        "generate": partial(generate, model),
        "generate_batch": partial(generate_batch, model),
        "ours, static batches": partial(ours_static, sampler),
        "ours": partial(ours, sampler),
    }
    known = {name: run for name, run in known.items() if name not in args.without}
    vocabulary = model.config.get_text_config().vocab_size
    command = " ".join(["python benchmarks/rollout.py", *sys.argv[1:]])
    print(heading(f"Sampling: {args.model}, {args.dtype}, {torch.get_num_threads()} threads", command), flush=True)
    for size in args.prompt_tokens:
        even = torch.full((PROMPTS, N), args.new_tokens)
        runs = {name: run for name, run in known.items() if name != "ours, static batches"}
        title = f"{PROMPTS} x {N}, prompts of {size} tokens, {args.new_tokens} new"
        steps = [PROMPTS * size, *[PROMPTS * N] * (args.new_tokens - 1)]
        print(
            compare(title, runs, draw(PROMPTS, size, vocabulary), even, PROMPTS * N, args.repeats, steps, model),
            flush=True,
        )
    if args.longest:
        size, lengths = args.prompt_tokens[0], long_tail(TAIL_PROMPTS, args.longest)
        runs = {name: run for name, run in known.items() if name != "generate_batch"}
        spread = f"1 to {lengths.max()} new, mean {lengths.float().mean():.0f}"
        title = f"{TAIL_PROMPTS} x {N}, {TAIL_SLOTS} at a time, prompts of {size} tokens, {spread}"
        whole, rest = divmod(int((lengths - 1).sum()), TAIL_SLOTS)
        steps = [TAIL_PROMPTS * size, *[TAIL_SLOTS] * whole, max(1, rest)]
        print(
            compare(title, runs, draw(TAIL_PROMPTS, size, vocabulary), lengths, TAIL_SLOTS, args.repeats, steps, model)
        )


if __name__ == "__main__":
    main()

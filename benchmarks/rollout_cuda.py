"""Measure tokens per second of 0.5B and 1.5B models on CUDA beside transformers' own, and a step beside its floor.

Run by `rollout.py --device cuda`. Random weights, bf16, 64 prompts x 8 samples of 512 tokens each. The floor of a step
is the time in which the memory's measured bandwidth moves what a step must read: the weights, and the keys and values
of every prompt, once, and of every response.
"""

import argparse
import sys
import time
from functools import partial

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from benchmarks.common import heading, table
from benchmarks.rollout_contestants import TEMPERATURE, N, draw, generate, generate_batch, ours, seconds
from gspo.models.loading import load_tokenizer
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import Sampler

PROMPTS, SLOTS, STEPS = 64, 256, 128
GROWN = 256  # tokens of a response when steps are timed
ARCHITECTURES = {  # Qwen2.5's, with random weights
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}


def random_model(name: str) -> nn.Module:
    config = AutoConfig.for_model(
        "qwen2", vocab_size=151_936, num_key_value_heads=2, tie_word_embeddings=True, dtype=torch.bfloat16,
        eos_token_id=None, **ARCHITECTURES[name],
    )  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    return model


def bandwidth(size: int = 2**31) -> float:
    """Return the bytes per second of a copy of `size` bytes, reads and writes counted."""
    a, b = torch.empty(2, size, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        b.copy_(a)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * a.nbytes / min(times)


@torch.no_grad()
def step(sampler: Sampler, size: int, vocabulary: int) -> tuple[float, float]:
    """Return the seconds of a step of SLOTS slots, reads by the host included, and the bytes that a step must read.

    Measured once every response has GROWN tokens.
    """
    sampler.engine.options.max_slots = SLOTS
    prompts = draw(SLOTS // N, size, vocabulary)
    sampling = Sampling(TEMPERATURE, max_new_tokens=STEPS + 512)
    generation = sampler.engine.start(sampler.requests(prompts, N, sampling))
    for _ in generation._fill_slots():
        pass
    slots, token = generation.slots, sum(layer.token_bytes for layer in sampler.engine.layout.values())
    while slots.length.min() < GROWN:
        list(generation._decode())
    before = slots.length.copy()
    torch.cuda.synchronize()
    began = time.perf_counter()
    while (slots.length - before).min() < STEPS:
        list(generation._decode())
    torch.cuda.synchronize()
    taken = (time.perf_counter() - began) / int((slots.length - before).min())
    kept = (before.sum() + slots.length.sum()) / 2 + size * len(prompts)
    weights = sum(p.nbytes for p in sampler.model.parameters())
    return taken, weights + float(kept) * token


def measure(name: str, size: int, new: int, repeats: int, without: list[str]) -> str:
    model = random_model(name)
    sampler = Sampler(model, load_tokenizer(None), torch.device("cuda"))
    sampler.end_ids = set()
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    vocabulary = model.config.vocab_size
    prompts, lengths = draw(PROMPTS, size, vocabulary), torch.full((PROMPTS, N), new)
    runs = {
        "generate": partial(generate, model),
        "generate_batch": partial(generate_batch, model),
        "ours": partial(ours, sampler),
    }
    lines, first = [], None
    for contestant, run in runs.items():
        if contestant in without:
            continue
        try:
            run(prompts[:2], torch.full((2, N), 16), 2 * N)
            rate = lengths.numel() * new / seconds(partial(run, prompts, lengths, lengths.numel()), repeats)
        except Exception as e:  # a contestant that does not run here: the table says why
            lines.append([contestant, "-", "-", f"{type(e).__name__}: {e}".splitlines()[0][:80]])
            continue
        first = first or rate
        print(f"{name}, {contestant}: {rate:.0f} tokens/s", file=sys.stderr)
        lines.append([contestant, f"{rate:.0f}", f"{rate / first:.1f}", ""])
    taken, needed = step(sampler, size, vocabulary)
    least = needed / bandwidth()
    lines.append(
        [f"our step of {SLOTS} slots", f"{SLOTS / taken:.0f}", "", f"{1000 * taken:.2f} ms, {least / taken:.0%}"]
    )
    lines.append([f"its floor, {needed / 2**30:.2f} GiB", f"{SLOTS / least:.0f}", "", f"{1000 * least:.2f} ms, 100%"])
    title = f"{name}: {PROMPTS} x {N}, prompts of {size} tokens, {new} new"
    return table([title, "tokens/s", "ratio", "a step, share of the floor's rate"], lines)


def main(args: argparse.Namespace) -> None:
    command = " ".join(["python benchmarks/rollout.py", *sys.argv[1:]])
    name = torch.cuda.get_device_name()
    print(heading(f"Sampling: Qwen2.5's shapes, random weights, bfloat16, {name}", command), flush=True)
    for architecture in ARCHITECTURES:
        for size in args.prompt_tokens or [256]:
            print(measure(architecture, size, args.new_tokens or 512, args.repeats, args.without), flush=True)

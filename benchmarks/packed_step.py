"""Time forward and backward of a packed micro-batch, beside the rate of matrix products alone.

    python benchmarks/packed_step.py [--model FOLDER] [--prompt 512 --response 512 --n 8 --groups 3] [--dtype bfloat16]

The model is Qwen2.5-0.5B's configuration with random weights, or a folder. Operations are those of matrix products: of
the layers for every packed token, of the head for response tokens, and of attention for every pair of tokens of which
one sees the other; the backward has twice as many. Activation checkpointing is off.
"""

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import heading, table
from gspo.models.loading import load_model
from gspo.packing.logprobs import response_logprobs
from gspo.packing.pack import PackedBatch, pack
from gspo.packing.probe_head import measure_head
from gspo.types import Prompt

HALF_B = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def seconds(call, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def a_pack(args: argparse.Namespace, vocabulary: int) -> PackedBatch:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (args.groups * args.n, args.response), generator=g).to(args.device)
    prompt = tuple(torch.randint(vocabulary, (args.prompt,), generator=g).tolist())
    prompts = [Prompt(i, prompt, "", "", "") for i in range(args.groups)]
    owners = [i for i in range(args.groups) for _ in range(args.n)]
    return pack(prompts, owners, tokens, torch.full((len(tokens),), args.response, device=args.device))


def work(model: nn.Module, args: argparse.Namespace) -> float:
    """Return the floating-point operations of one forward and backward."""
    c = model.config.get_text_config()
    layers = sum(p.numel() for name, p in model.base_model.layers.named_parameters() if p.ndim == 2)
    answers, p, r = args.groups * args.n * args.response, args.prompt, args.response
    pairs = args.groups * (p * (p + 1) / 2 + args.n * (r * p + r * (r + 1) / 2))
    width = c.num_attention_heads * (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    products = layers * (args.groups * p + answers) + c.vocab_size * c.hidden_size * answers
    return 3 * (2 * products + 4 * pairs * width * c.num_hidden_layers)


def bare_rate(tokens: int, width: int, wide: int, dtype: torch.dtype, device: str) -> float:
    a, b = torch.randn(tokens, width, dtype=dtype, device=device), torch.randn(width, wide, dtype=dtype, device=device)
    best = min(seconds(lambda: [torch.mm(a, b) for _ in range(10)], device) for _ in range(5))
    return 20 * tokens * width * wide / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder (default: a 0.5B shape with random weights)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    cuda = parser.parse_known_args()[0].device == "cuda"
    parser.add_argument("--prompt", type=int, default=512 if cuda else 64, help="tokens")
    parser.add_argument("--response", type=int, default=512 if cuda else 64, help="tokens")
    parser.add_argument("--n", type=int, default=8, help="responses a prompt")
    parser.add_argument("--groups", type=int, default=3 if cuda else 1)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--square", type=int, default=8192, help="CUDA: rows and columns of the best bare product")
    parser.add_argument("--repeats", type=int, default=10 if cuda else 3)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = load_model(args.model) if args.model else AutoModelForCausalLM.from_config(Qwen2Config(**HALF_B)).eval()
    head = measure_head(model)
    model.to(args.device)
    packed = a_pack(args, model.config.get_text_config().vocab_size)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(args.device, dtype) if dtype != torch.float32 else nullcontext():
            logprobs = response_logprobs(model, head, packed, 0.9)
        logprobs.sum().backward()

    seconds(step, args.device)
    c = model.config.get_text_config()
    rates = [bare_rate(packed.ids.shape[1], c.hidden_size, c.intermediate_size, dtype, args.device)]
    times = [seconds(step, args.device) for _ in range(args.repeats)]
    rates.append(bare_rate(packed.ids.shape[1], c.hidden_size, c.intermediate_size, dtype, args.device))
    peak = max(rates)
    if cuda:  # the GPU's best rate, not that of these narrow matrices
        peak = max(peak, bare_rate(args.square, args.square, args.square, dtype, args.device))
    took, flops = statistics.median(times), work(model, args)
    shape = f"{args.groups} x ({args.prompt} + {args.n} x {args.response}) tokens, {args.dtype}"
    name = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    print(heading(f"A packed forward and backward: {shape}, {name}", " ".join(["python", *sys.argv])))
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if cuda else "-"
    row = [f"{took:.3g}", f"{flops / took / 1e12:.3g}", f"{peak / 1e12:.3g}", f"{flops / took / peak:.0%}", memory]
    print(table(["seconds", "TFLOP/s", "bare products, TFLOP/s", "share", "peak GiB"], [row]))


if __name__ == "__main__":
    main()

"""Time every compiled kernel for CPUs beside its PyTorch form, in turns, at the sizes of SmolLM2-135M.

    python benchmarks/cpu_kernels.py [--turns N]   # a minute

Each line is one operation of a training or a decoding step: milliseconds of ours and of PyTorch's, and how many times
as fast ours is. The PyTorch form is what runs with GSPO_NATIVE=0: the module of transformers, scaled dot product
attention over the same packs, oneDNN's product with weights that it laid out.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gspo  # noqa: F401 -- before torch

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from benchmarks.common import heading, table
from benchmarks.step_stages import instruction_sets
from gspo.kernels import draw_token_cpu, logprob_chunk, logprob_chunk_cpu, norm_gate_rotary
from gspo.kernels.logprob_chunk import LogitTransform, new_stats
from gspo.kernels.onednn_linear_cpu import onednn_lay_out, onednn_linear
from gspo.kernels.packed_attention_cpu import Rows, rows_attention
from gspo.kernels.panel_linear_cpu import laid_out_linear, lay_out
from gspo.rollout.draw_tokens import Sampling, choose, uniforms

TOKENS, WIDTH, BETWEEN, HEADS, KV_HEADS, HEAD, VOCABULARY = 1200, 576, 1536, 9, 3, 64, 49_152
CHUNK = 4096  # entries of the vocabulary at a time
RESPONSES, PROMPT, NEW = 8, 60, 64  # a pack: responses of NEW tokens to one prompt
Work = Callable[[], object]


def seconds(turns: int, *works: Work) -> list[float]:
    """Return the shortest time of each in so many turns, so that a busy moment meets all."""
    best = [float("inf")] * len(works)
    for _ in range(turns):
        for i, work in enumerate(works):
            began = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def there_and_back(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> Work:
    """Return the work of a forward and a backward through a function."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    wide = [torch.ones_like(x) for x in (out if isinstance(out, tuple) else (out,))]

    def work() -> None:
        found = function(*leaves)
        torch.autograd.backward(found if isinstance(found, tuple) else (found,), wide)

    return work


def in_layers(dtype: torch.dtype) -> Iterator[tuple[str, Work, Work]]:
    """Yield what lies between a layer's products, forward and backward."""
    x, weight = torch.randn(TOKENS, WIDTH, dtype=dtype), torch.ones(WIDTH)
    norm = LlamaRMSNorm(WIDTH, 1e-5)
    yield (
        "RMSNorm",
        there_and_back(lambda x: norm_gate_rotary.rms_norm(x, weight, 1e-5), x),
        there_and_back(norm, x),
    )
    gate, up = torch.randn(2, TOKENS, BETWEEN).to(dtype)
    yield (
        "SiLU x gate",
        there_and_back(norm_gate_rotary.silu_product, gate, up),
        there_and_back(lambda g, u: F.silu(g) * u, gate, up),
    )
    q, k = torch.randn(1, HEADS, TOKENS, HEAD).to(dtype), torch.randn(1, KV_HEADS, TOKENS, HEAD).to(dtype)
    cos, sin = torch.randn(2, 1, TOKENS, HEAD).to(dtype)
    yield (
        "rotary positions",
        there_and_back(lambda q, k: norm_gate_rotary.rotate(q, k, cos, sin), q, k),
        there_and_back(lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), q, k),
    )


def attention(dtype: torch.dtype) -> tuple[str, Work, Work]:
    """Return attention over a pack whose responses share a prompt; PyTorch's computes the prompt for each,
    in float32, as packs do without our kernel."""
    sizes = [PROMPT + NEW] * RESPONSES
    rows, tokens = Rows.apart(sizes), sum(sizes)
    q = torch.randn(tokens, HEADS, HEAD).to(dtype)
    k, v = torch.randn(2, tokens, KV_HEADS, HEAD).to(dtype)
    batch = [x.view(RESPONSES, PROMPT + NEW, -1, HEAD).transpose(1, 2) for x in (q, k, v)]
    return (
        f"attention, {RESPONSES} x {PROMPT + NEW} tokens",
        there_and_back(lambda q, k, v: rows_attention(q, k, v, rows, HEAD**-0.5), q, k, v),
        there_and_back(
            lambda q, k, v: F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True
            ),
            *batch,
        ),
    )


def in_head(dtype: torch.dtype) -> Iterator[tuple[str, Work, Work]]:
    """Yield the work between the head's products, on one chunk of the vocabulary."""
    raw, targets = torch.randn(TOKENS, CHUNK).to(dtype), torch.randint(CHUNK, (TOKENS,))
    transform, rows = LogitTransform.of(1.0, None, 0.9), torch.randn(3, TOKENS).abs() + 5
    stats = new_stats(TOKENS, raw)
    yield (
        "log-prob: statistics of logits",
        lambda: logprob_chunk_cpu.add_statistics(raw, 0, targets, stats.clone(), transform),
        lambda: logprob_chunk.add_statistics(raw, 0, targets, stats.clone(), transform),
    )
    yield (
        "log-prob: gradient of logits",
        lambda: logprob_chunk_cpu.to_gradient(raw.clone(), 0, targets, rows, transform),
        lambda: logprob_chunk.to_gradient(raw.clone(), 0, targets, rows, transform),
    )


def while_sampling(dtype: torch.dtype) -> Iterator[tuple[str, Work, Work]]:
    """Yield the products and the draw of a decoding step of 64 responses."""
    for outputs, inputs in ((WIDTH, WIDTH), (BETWEEN, WIDTH), (WIDTH, BETWEEN), (VOCABULARY, WIDTH)):
        x, weight = torch.randn(64, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        ours, theirs = lay_out(weight), onednn_lay_out(weight, 64)
        yield (
            f"product, 64 rows, {inputs} x {outputs}",
            lambda ours=ours, outputs=outputs, x=x: laid_out_linear(ours, outputs, None, x),
            lambda theirs=theirs, x=x: onednn_linear(theirs, None, x),
        )
    logits, keys = torch.randn(64, VOCABULARY).to(dtype), torch.arange(64)
    sampling = Sampling(0.9)
    yield (
        "draw of 64 tokens",
        lambda: draw_token_cpu.sample(logits, keys, keys, 0.9),
        lambda: choose(logits, uniforms(keys, keys), sampling),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, metavar="N", help="of each operation; the shortest counts")
    turns = parser.parse_args().turns
    print(heading("Compiled kernels for CPUs beside PyTorch", "python benchmarks/cpu_kernels.py"))
    print(f"Instruction sets: {instruction_sets()}; {torch.get_num_threads()} threads.\n")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        cases = [*in_layers(dtype), attention(dtype), *in_head(dtype)]
        timed = [(name, *seconds(turns, ours, theirs)) for name, ours, theirs in cases]
        with torch.no_grad():
            timed += [(name, *seconds(turns, ours, theirs)) for name, ours, theirs in while_sampling(dtype)]
        rows += [
            [str(dtype)[6:], name, f"{1e3 * ours:.3g}", f"{1e3 * theirs:.3g}", f"{theirs / ours:.2f}"]
            for name, ours, theirs in timed
        ]
    print(table(["", "operation", "ours, ms", "PyTorch, ms", "times as fast"], rows))


if __name__ == "__main__":
    main()

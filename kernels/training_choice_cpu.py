"""Choose, by a measurement on this machine, between our kernels of a training step and PyTorch's operators.

Every operation computes forward and backward both ways, at the sizes of SmolLM2-135M and a few hundred tokens, in
tenths of a second (`measured_choice_cpu.py`). Results are the same to rounding.
"""

import functools
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gspo.kernels import logprob_chunk, logprob_chunk_cpu, norm_gate_rotary
from gspo.kernels.logprob_chunk import LogitTransform, new_stats
from gspo.kernels.measured_choice_cpu import Choices, Times, decide, ours_always, seconds
from gspo.kernels.packed_attention_cpu import Rows, rows_attention

TOKENS, WIDTH, BETWEEN, HEADS, KV_HEADS, HEAD, VOCABULARY = 256, 576, 1536, 9, 3, 64, 2048
PROMPT, RESPONSES, NEW = 48, 6, 48  # tokens of a prompt; responses to it, and tokens of each
Work = Callable[[], tuple[Tensor, ...]]  # results, and gradients


def kernel_wins(operation: str, dtype: torch.dtype) -> bool:
    """Return whether our kernel computes norm, gate, rotary, attention or log-probs in `dtype`, rather than PyTorch.

    For CPU tensors that the kernel takes. GSPO_NATIVE=1 chooses it without a measurement.
    """
    return ours_always() or _decide(dtype, torch.get_num_threads())[operation]


@functools.lru_cache
def _decide(dtype: torch.dtype, threads: int) -> Choices:
    def describe(times: Times, found: Choices) -> str:
        parts = ", ".join(f"{name} {1e3 * ours:.2g} / {1e3 * theirs:.2g}" for name, (ours, theirs) in times.items())
        others = ", ".join(name for name, ours in found.items() if not ours)
        chosen = f"PyTorch's for {others}" if others else "ours are used"
        return f"training in {str(dtype)[6:]}, ms of ours / PyTorch's: {parts}: {chosen} (GSPO_NATIVE=1: ours always)"

    return decide(["training", str(dtype)], functools.partial(measure, dtype), describe)


def measure(dtype: torch.dtype) -> Times:
    """Return the seconds that each operation takes with our kernel and with PyTorch's operators."""
    g = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    return {name: seconds(ours, theirs) for name, ours, theirs in works(dtype, g)}


def works(dtype: torch.dtype, g: torch.Generator) -> Iterator[tuple[str, Work, Work]]:
    """Yield each operation's name, its work by our kernel, and by what runs in its place with GSPO_NATIVE=0."""

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    x, weight = numbers(TOKENS, WIDTH), numbers(WIDTH)
    ours = functools.partial(norm_gate_rotary.rms_norm, eps=1e-5)
    yield "norm", _there_and_back(ours, x, weight), _there_and_back(_norm, x, weight)
    gate, up = numbers(TOKENS, BETWEEN), numbers(TOKENS, BETWEEN)
    yield (
        "gate",
        _there_and_back(norm_gate_rotary.silu_product, gate, up),
        _there_and_back(lambda a, b: F.silu(a) * b, gate, up),
    )
    q, k = numbers(1, HEADS, TOKENS, HEAD), numbers(1, KV_HEADS, TOKENS, HEAD)
    cos, sin = numbers(1, TOKENS, HEAD), numbers(1, TOKENS, HEAD)
    yield (
        "rotary",
        _there_and_back(lambda q, k: norm_gate_rotary.rotate(q, k, cos, sin), q, k),
        _there_and_back(lambda q, k: (_rotated(q, cos, sin), _rotated(k, cos, sin)), q, k),
    )
    q, k, v = (numbers(PROMPT + RESPONSES * NEW, heads, HEAD) for heads in (HEADS, KV_HEADS, KV_HEADS))
    rows = _shared_prompt()
    yield (
        "attention",
        _there_and_back(lambda q, k, v: rows_attention(q, k, v, rows, HEAD**-0.5), q, k, v),
        _there_and_back(_attention, q, k, v),
    )
    raw = numbers(TOKENS, VOCABULARY)
    yield "log-probs", *(functools.partial(_log_probs, module, raw) for module in (logprob_chunk_cpu, logprob_chunk))


def _there_and_back(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> Work:
    leaves = [x.detach().requires_grad_() for x in inputs]

    def work() -> tuple[Tensor, ...]:
        found = function(*leaves)
        found = found if isinstance(found, tuple) else (found,)
        return *found, *torch.autograd.grad(found, leaves, [torch.ones_like(x) for x in found])

    return work


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


def _shared_prompt() -> Rows:
    """Return a prompt and responses to it, stored one after another, as sequences that share its tokens."""
    prompt, new = np.arange(PROMPT), np.arange(NEW)
    own = [PROMPT + r * NEW + new for r in range(RESPONSES)]
    keys = np.concatenate([prompt, *(part for mine in own for part in (prompt, mine))])
    sizes, asking = np.array([PROMPT] + [PROMPT + NEW] * RESPONSES), np.array([PROMPT] + [NEW] * RESPONSES)
    return Rows.of(
        keys, sizes, np.arange(PROMPT + RESPONSES * NEW), asking, np.concatenate([prompt] + [PROMPT + new] * RESPONSES)
    )


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by padded rows and a mask, in float32, as packs do without our kernel; -> [T, H, D]."""
    q, k, v = (x.float().transpose(0, 1) for x in (q, k, v))
    prompts = F.scaled_dot_product_attention(*(x[None, :, :PROMPT] for x in (q, k, v)), is_causal=True, enable_gqa=True)
    own, keys, values = (x[:, PROMPT:].unflatten(1, (RESPONSES, NEW)).transpose(0, 1) for x in (q, k, v))
    keys, values = (torch.cat([x[:, :PROMPT].expand(RESPONSES, -1, -1, -1), y], 2) for x, y in ((k, keys), (v, values)))
    seen = torch.ones(NEW, PROMPT + NEW, dtype=torch.bool).tril(PROMPT)
    responses = F.scaled_dot_product_attention(own, keys, values, attn_mask=seen, enable_gqa=True)
    return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in (prompts, responses)])


def _log_probs(module: ModuleType, raw: Tensor) -> tuple[Tensor, ...]:
    """Turn a chunk of products into statistics of log-probs, and into the gradient with respect to it."""
    transform, targets = LogitTransform.of(1.0, None, 0.9), torch.zeros(len(raw), dtype=torch.int64)
    chunk, stats = raw.clone(), new_stats(len(raw), raw)
    module.add_statistics(chunk, 0, targets, stats, transform)
    module.to_gradient(chunk, 0, targets, torch.stack([stats[0], stats[1].log(), stats[1]]), transform)
    return stats, chunk

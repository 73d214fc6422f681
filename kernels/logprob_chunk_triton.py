"""Run the two functions of `logprob_chunk.py` as Triton kernels, each with one read (and one write) of a chunk.

Both are bound by memory bandwidth: 16-byte accesses, no exchange between programs, no atomics, float32 arithmetic, and
bf16 rounded to nearest only where a result is stored. Rows of a chunk are padded to a multiple of 128 elements
(`logprob.py`), so that loads stay wide whatever the vocabulary is; values in the padding are never used.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspo.kernels.logprob_chunk import LogitTransform

BLOCK = 4096  # elements of a row that one program holds at a time


@triton.jit
def shaped(raw, inner, outer, CAPPED: tl.constexpr):
    """Return the logits and the factor of k in their derivative: 1 - tanh^2 = 4 x / (1 + x)^2, x = exp(-2 |u|)."""
    u = raw * inner
    bend = 1.0
    if CAPPED:
        x = tl.exp(-2.0 * tl.abs(u))
        tanh = (1.0 - x) / (1.0 + x)
        bend = 4.0 * x / ((1.0 + x) * (1.0 + x))
        u = outer * tl.where(u < 0, -tanh, tanh)
    return u, bend


@triton.jit(do_not_specialize=["begin", "width"])
def statistics_kernel(
    raw_ptr, target_ptr, stats_ptr, tokens, begin, width, stride, inner, outer,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a token's row of the chunk to its column of stats [3, tokens], by online softmax. One program a token."""
    token = tl.program_id(0)
    raw_ptr += token.to(tl.int64) * stride
    m = tl.load(stats_ptr + token)
    s = tl.load(stats_ptr + tokens + token)
    column = (tl.load(target_ptr + token) - begin).to(tl.int32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        raw = tl.load(raw_ptr + cols, mask=cols < stride, other=0.0).to(tl.float32)
        z, _ = shaped(raw, inner, outer, CAPPED)
        z = tl.where(cols < width, z, -float("inf"))
        top = tl.maximum(m, tl.max(z, 0))
        fade = tl.exp(m - top)
        p = tl.exp(z - top)
        s = fade * s + tl.sum(p, 0)
        m = top
    tl.store(stats_ptr + token, m)
    tl.store(stats_ptr + tokens + token, s)
    if (column >= 0) & (column < width):
        raw = tl.load(raw_ptr + column).to(tl.float32)
        t, _ = shaped(raw, inner, outer, CAPPED)
        tl.store(stats_ptr + 2 * tokens + token, t)


@triton.jit(do_not_specialize=["begin", "width", "blocks"])
def gradient_kernel(
    raw_ptr, target_ptr, rows_ptr, tokens, begin, width, stride, blocks, inner, outer,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrite BLOCK elements of a token's row with their gradients. One program a block."""
    token = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    at = raw_ptr + token.to(tl.int64) * stride + cols
    raw = tl.load(at, mask=cols < stride, other=0.0).to(tl.float32)
    m = tl.load(rows_ptr + token)
    log_s = tl.load(rows_ptr + tokens + token)
    slope = tl.load(rows_ptr + 2 * tokens + token)
    column = (tl.load(target_ptr + token) - begin).to(tl.int32)
    z, bend = shaped(raw, inner, outer, CAPPED)
    d = (tl.where(cols == column, slope, 0.0) - tl.exp((z - m) - log_s) * slope) * bend
    tl.store(at, d.to(raw_ptr.dtype.element_ty), mask=cols < stride)


def warps(block: int) -> int:
    """Return the warps of a program: 16 elements a thread, all loads of a block in flight, 32 to 48 registers."""
    return max(1, block // 512)


def _sizes(raw: Tensor) -> dict[str, int]:
    block = min(BLOCK, triton.next_power_of_2(raw.shape[1]))
    return {"BLOCK": block, "num_warps": warps(block)}


def add_statistics(raw: Tensor, begin: int, targets: Tensor, stats: Tensor, transform: LogitTransform) -> None:
    """Compute `logprob_chunk.add_statistics`, stats in float32."""
    assert raw.stride(1) == 1 and stats.is_contiguous() and stats.dtype == torch.float32
    tokens, width = raw.shape
    with torch.cuda.device_of(raw):
        statistics_kernel[(tokens,)](
            raw, targets, stats, tokens, begin, width, raw.stride(0), transform.inner, transform.outer,
            CAPPED=transform.capped, **_sizes(raw),
        )  # fmt: skip


def to_gradient(raw: Tensor, begin: int, targets: Tensor, rows: Tensor, transform: LogitTransform) -> None:
    """Compute `logprob_chunk.to_gradient`, rows in float32."""
    assert raw.stride(1) == 1 and rows.is_contiguous() and rows.dtype == torch.float32
    tokens, width = raw.shape
    sizes = _sizes(raw)
    blocks = triton.cdiv(width, sizes["BLOCK"])
    with torch.cuda.device_of(raw):
        gradient_kernel[(tokens * blocks,)](
            raw, targets, rows, tokens, begin, width, raw.stride(0), blocks, transform.inner, transform.outer,
            CAPPED=transform.capped, **sizes,
        )  # fmt: skip

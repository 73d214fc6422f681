"""Compute causal attention of sequences that share tokens on a CPU, forward and backward (cpu/packed_attention.cpp).

Nothing is gathered or padded, and no mask is built: a sequence is a list of token indices, and a prefix that several
sequences share is stored once. Scores and sums are float32; in bfloat16 the attention weights are rounded before they
are multiplied by values, as on GPUs, and so are the scores' gradients in the backward.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gspo.kernels.native import call, cpu_kernels_take, is_bf16, size_array, tensor_array

PAD = 16
SUMS = 2**28  # bytes for the threads' sums of dk and dv in the backward; larger sums mean fewer threads


class Rows(NamedTuple):
    """R sequences, int32 on the CPU. Row r has the tokens keys[first_key[r] : first_key[r + 1]], in order."""

    first_key: Tensor  # [R + 1]
    keys: Tensor
    first_query: Tensor  # [R + 1], the same for the queries, of which each token has one, in one row
    queries: Tensor
    positions: Tensor  # of each query in its row: it sees the keys up to this position

    @classmethod
    def of(cls, keys: np.ndarray, sizes: np.ndarray, queries: np.ndarray, asking: np.ndarray, at: np.ndarray) -> "Rows":
        """Make them from keys, `sizes` [R] of each row, and queries, `asking` [R] of each row, at positions `at`."""
        arrays = (_starts(sizes), keys, _starts(asking), queries, at)
        return cls(*(torch.from_numpy(x.astype(np.int32)) for x in arrays))

    @classmethod
    def apart(cls, sizes: list[int]) -> "Rows":
        """Make them from the sizes of sequences that are stored one after another and share nothing."""
        n = np.array(sizes)
        every = np.arange(n.sum())
        return cls.of(every, n, every, n, every - np.repeat(n.cumsum() - n, n))


NO_ROWS = Rows(*[torch.zeros(0, dtype=torch.int32)] * 5)  # for fake tensors


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], counts.cumsum()])


def rows_kernel_takes(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether `rows_attention` takes tensors [..., D], [..., D], [..., Dv], as they are or in `dtype`."""
    same = dtype is not None or q.dtype == k.dtype == v.dtype
    even = (dtype or q.dtype) == torch.float32 or not (q.shape[-1] % 2 or v.shape[-1] % 2)
    return cpu_kernels_take(q, k, v) and same and even and max(q.shape[-1], v.shape[-1]) <= 4096


def rows_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float, softcap: float | None = None, window: int | None = None
) -> Tensor:
    """Attend with q [T, H, D], k [T, Hk, D], v [T, Hk, Dv] of T tokens and return [T, H, Dv], differentiable.

    `window`: positions that a token sees, its own included. For tensors that `rows_kernel_takes` accepts.
    """
    return _Attention.apply(*map(_pairs_in_place, (q, k, v)), rows, scale, softcap, window)


def _pairs_in_place(x: Tensor) -> Tensor:
    """Return x, or a copy in which every pair of bfloat16 neighbours begins at an even index."""
    *steps, last = x.stride()
    return x if last == 1 and not any(step % 2 for step in steps) else x.contiguous()


def _sizes(q: Tensor, k: Tensor, v: Tensor, rows: Rows, window: int | None) -> Any:
    """Return the array `sizes` of both kernels: shapes, the window (0: none), strides."""
    tokens, heads, width = q.shape
    shape = [len(rows.first_key) - 1, tokens, heads, k.shape[1], width, v.shape[2], window or 0]
    return size_array(*shape, *(stride for x in (q, k, v) for stride in x.stride()[:2]))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float, softcap: float | None, window: int | None
    ) -> Tensor:
        out, top = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(*q.shape[:2], 2, dtype=torch.float32)
        call(
            "gspo_rows", bf16=is_bf16(q), sequences=tensor_array(*rows), sizes=_sizes(q, k, v, rows, window), q=q, k=k,
            v=v, scale=scale, softcap=softcap or 0.0, out=out, top=top,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, top)
        ctx.rows, ctx.scale, ctx.softcap, ctx.window = rows, scale, softcap, window
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, top = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        each = k.shape[0] * k.shape[1] * sum(-(-x.shape[2] // PAD) * PAD for x in (k, v))
        threads = max(1, min(torch.get_num_threads(), SUMS // (4 * each)))
        sums = q.new_empty(threads * each, dtype=torch.float32)
        call(
            "gspo_rows_back", bf16=is_bf16(q), sequences=tensor_array(*ctx.rows),
            sizes=_sizes(q, k, v, ctx.rows, ctx.window), dout=dout.contiguous(), q=q, k=k, v=v, out=out, top=top,
            scale=ctx.scale, softcap=ctx.softcap or 0.0, dq=dq, dk=dk, dv=dv, sums=sums, at_most=threads,
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None

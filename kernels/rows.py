"""Causal attention of sequences that share tokens, for CPUs, in compiled code (cpu/rows.cpp): forward and backward.

Nothing is gathered or padded, and no mask is built: a sequence is a list of places among the tokens, and what several
sequences begin with is there once. Scores and sums are float32; in bfloat16 the products of a weight and a value round
the weight first, as GPUs do, and the backward rounds slopes likewise.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gspo.kernels.native import call, numbers, pointers, takes

PAD = 16
SUMS = 2**28  # bytes for what threads sum up in the backward; fewer threads where each needs more


class Rows(NamedTuple):
    """R sequences, int32 on the CPU. Row r has the tokens keys[first_key[r] : first_key[r + 1]], by position."""

    first_key: Tensor  # [R + 1]
    keys: Tensor
    first_query: Tensor  # [R + 1], the same for the tokens that ask: each is in one row
    queries: Tensor
    positions: Tensor  # of each query in its row: it sees the keys up to there

    @classmethod
    def of(cls, keys: np.ndarray, sizes: np.ndarray, queries: np.ndarray, asking: np.ndarray, at: np.ndarray) -> "Rows":
        """keys of `sizes` [R] tokens a row, queries of `asking` [R] a row, at positions `at`."""
        arrays = (_starts(sizes), keys, _starts(asking), queries, at)
        return cls(*(torch.from_numpy(x.astype(np.int32)) for x in arrays))

    @classmethod
    def apart(cls, sizes: list[int]) -> "Rows":
        """Sequences one behind the other that share nothing."""
        n = np.array(sizes)
        every = np.arange(n.sum())
        return cls.of(every, n, every, n, every - np.repeat(n.cumsum() - n, n))


NO_ROWS = Rows(*[torch.zeros(0, dtype=torch.int32)] * 5)  # for tensors without storage


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], counts.cumsum()])


def attends(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether there is compiled code for tensors [..., D], [..., D], [..., Dv], or for them in `dtype`."""
    same = dtype is not None or q.dtype == k.dtype == v.dtype
    even = (dtype or q.dtype) == torch.float32 or not (q.shape[-1] % 2 or v.shape[-1] % 2)
    return takes(q, k, v) and same and even and max(q.shape[-1], v.shape[-1]) <= 4096


def rows_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float, softcap: float | None = None, window: int | None = None
) -> Tensor:
    """q [T, H, D], k [T, Hk, D], v [T, Hk, Dv] of T tokens -> [T, H, Dv], with gradients.

    `window`: positions that a token sees, its own included. For tensors that `attends`.
    """
    return _Attention.apply(*map(_pairs_in_place, (q, k, v)), rows, scale, softcap, window)


def _pairs_in_place(x: Tensor) -> Tensor:
    """Pairs of neighbours begin at even places."""
    *steps, last = x.stride()
    return x if last == 1 and not any(step % 2 for step in steps) else x.contiguous()


def _shape(q: Tensor, k: Tensor, v: Tensor, rows: Rows, window: int | None) -> Any:
    tokens, heads, width = q.shape
    shape = [len(rows.first_key) - 1, tokens, heads, k.shape[1], width, v.shape[2], window or 0]
    return numbers([*shape, *(stride for x in (q, k, v) for stride in x.stride()[:2])])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float, softcap: float | None, window: int | None
    ) -> Tensor:
        out, top = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(*q.shape[:2], 2, dtype=torch.float32)
        given, how = (pointers(*rows), _shape(q, k, v, rows, window)), (scale, softcap or 0.0)
        call("gspo_rows", int(q.dtype == torch.bfloat16), *given, q, k, v, *how, out, top)
        ctx.save_for_backward(q, k, v, out, top)
        ctx.rows, ctx.how, ctx.window = rows, how, window
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, top = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        each = k.shape[0] * k.shape[1] * sum(-(-x.shape[2] // PAD) * PAD for x in (k, v))
        threads = max(1, min(torch.get_num_threads(), SUMS // (4 * each)))
        sums = q.new_empty(threads * each, dtype=torch.float32)
        given = int(q.dtype == torch.bfloat16), pointers(*ctx.rows), _shape(q, k, v, ctx.rows, ctx.window)
        call("gspo_rows_back", *given, dout.contiguous(), q, k, v, out, top, *ctx.how, dq, dk, dv, sums, threads)
        return dq, dk, dv, None, None, None, None

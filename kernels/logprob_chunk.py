"""Process a chunk of logits between two matrix products: add up log-prob statistics, or turn it into gradients.

This is the plain PyTorch; `logprob_chunk_triton.py` (CUDA) and `logprob_chunk_cpu.py` have the same two functions.

A chunk is `raw [T, w] = hidden @ weight[begin : begin + w].T`. Its logits are `z = outer * f(inner * raw)`, where f is
the identity or tanh. Three numbers a token are carried from chunk to chunk, the rows of `stats [3, T]`:

    m = max z      s = sum exp(z - m)      t = z[target]

so that log-prob = t - m - log s.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2**20  # elements
LOWEST = -1e30  # the maximum of no logits; with -inf the first chunk would compute 0 * inf


class LogitTransform(NamedTuple):
    """Map raw products to logits: outer * tanh(inner * raw) if capped, else inner * raw (and outer is 1)."""

    inner: float
    outer: float
    capped: bool

    @classmethod
    def of(cls, scale: float, softcap: float | None, temperature: float) -> "LogitTransform":
        """Make softcap * tanh(scale * raw / softcap) / temperature: the order of Cohere's scale and Gemma 2's cap."""
        if softcap is None:
            return cls(scale / temperature, 1.0, False)
        return cls(scale / softcap, softcap / temperature, True)

    def __call__(self, raw: Tensor, out: Tensor) -> Tensor:
        """Write the logits to `out`, whose dtype may be wider, and return it."""
        z = out.copy_(raw)
        if self.inner != 1.0:
            z.mul_(self.inner)
        return z.tanh_().mul_(self.outer) if self.capped else z


def new_stats(tokens: int, like: Tensor) -> Tensor:
    """Return the statistics [3, T] before the first chunk, at least float32."""
    stats = like.new_zeros(3, tokens, dtype=torch.promote_types(like.dtype, torch.float32))
    stats[0].fill_(LOWEST)
    return stats


def add_statistics(raw: Tensor, begin: int, targets: Tensor, stats: Tensor, transform: LogitTransform) -> None:
    """Add a chunk, which begins at entry `begin` of the vocabulary, to `stats` in place. `raw` is not changed."""
    m, s, t = stats
    for first, part, z, p in _blocks(raw, stats.dtype):
        transform(part, z)
        inside, column = _target_columns(part, begin + first, targets)
        t.copy_(torch.where(inside, z.gather(1, column)[:, 0], t))
        top = torch.maximum(m, z.amax(1))
        fade = (m - top).exp_()
        torch.exp(z.sub_(top[:, None]), out=p)
        s.mul_(fade).add_(p.sum(1))
        m.copy_(top)


def to_gradient(raw: Tensor, begin: int, targets: Tensor, rows: Tensor, transform: LogitTransform) -> None:
    """Overwrite a chunk of raw products with the loss's gradient with respect to them.

    With p = exp(z - m - log s) and dz/draw = k (1 - tanh^2):

        dL/draw = k (1 - tanh^2) dL/dlogprob (onehot - p)

    rows [3, T] = m, log s, k dL/dlogprob. m and log s are kept apart because the rounding error of their sum would be
    the same for all of a token's row.
    """
    m, log_s, slope = rows[:, :, None]
    for first, part, z, p in _blocks(raw, rows.dtype):
        transform(part, z)
        torch.exp(z.sub_(m).sub_(log_s), out=p)
        d = p.mul_(-slope)
        inside, column = _target_columns(part, begin + first, targets)
        d.scatter_add_(1, column, torch.where(inside[:, None], slope, 0.0))
        if transform.capped:
            bend = transform(part, z).div_(transform.outer).square_().neg_().add_(1.0)
            d.mul_(bend)
        part.copy_(d)


def _blocks(raw: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield (first column, block, two scratch tensors like it in `dtype`), in blocks that fit a CPU's cache.

    The scratch memory is reused: on a CPU fresh pages cost more than the arithmetic on them.
    """
    tokens, width = raw.shape
    step = min(max(BLOCK // max(tokens, 1), 64), width)
    scratch = raw.new_empty(2, tokens * step, dtype=dtype)
    for first in range(0, width, step):
        part = raw[:, first : first + step]
        z, p = scratch[:, : part.numel()].unflatten(1, part.shape)
        yield first, part, z, p


def _target_columns(raw: Tensor, begin: int, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether a token's target is among these columns [T], and a column that is valid either way [T, 1]."""
    column = targets - begin
    inside = (column >= 0) & (column < raw.shape[1])
    return inside, column.clamp(0, raw.shape[1] - 1)[:, None]

"""What happens to a chunk of logits between two matrix products, in plain PyTorch; `epilogue_triton.py` does the same.

A chunk is `raw [T, w] = hidden @ weight[begin : begin + w].T`. Its logits are `z = outer * f(inner * raw)`, where f is
the identity or tanh. Of each token four numbers are carried from chunk to chunk, the rows of `stats [4, T]`:

    m = max z      s = sum exp(z - m)      e = sum exp(z - m) * (z - m)      t = z[target]

so that log-prob = t - m - log s and entropy = log s - e / s. No term of e is positive: the sum does not cancel.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2**20  # elements
LOWEST = -1e30  # the maximum of no logits; with -inf the first chunk would compute 0 * inf


class Shaping(NamedTuple):
    """From raw products to logits: outer * tanh(inner * raw) if capped, else inner * raw (and outer is 1)."""

    inner: float
    outer: float
    capped: bool

    @classmethod
    def of(cls, scale: float, softcap: float | None, temperature: float) -> "Shaping":
        """softcap * tanh(scale * raw / softcap) / temperature, in the order of Cohere's scale and Gemma 2's cap."""
        if softcap is None:
            return cls(scale / temperature, 1.0, False)
        return cls(scale / softcap, softcap / temperature, True)

    def __call__(self, raw: Tensor, out: Tensor) -> Tensor:
        """Logits into `out`, which may be wider."""
        z = out.copy_(raw)
        if self.inner != 1.0:
            z.mul_(self.inner)
        return z.tanh_().mul_(self.outer) if self.capped else z


def new_stats(tokens: int, like: Tensor) -> Tensor:
    """The four numbers of each token before the first chunk: [4, T], at least float32."""
    stats = like.new_zeros(4, tokens, dtype=torch.promote_types(like.dtype, torch.float32))
    stats[0].fill_(LOWEST)
    return stats


def add_statistics(raw: Tensor, begin: int, targets: Tensor, stats: Tensor, shaping: Shaping, entropy: bool) -> None:
    """Take a chunk into `stats`, in place (e only if entropy is asked for). `raw` stays as it is."""
    m, s, e, t = stats
    for first, part, z, p in _blocks(raw, stats.dtype):
        shaping(part, z)
        inside, column = _target_columns(part, begin + first, targets)
        t.copy_(torch.where(inside, z.gather(1, column)[:, 0], t))
        top = torch.maximum(m, z.amax(1))
        fade = (m - top).exp_()
        q = z.sub_(top[:, None])
        torch.exp(q, out=p)
        if entropy:
            e.add_(s * (m - top)).mul_(fade).add_(q.mul_(p).sum(1))
        s.mul_(fade).add_(p.sum(1))
        m.copy_(top)


def to_gradient(raw: Tensor, begin: int, targets: Tensor, rows: Tensor, shaping: Shaping) -> None:
    """Overwrite a chunk of raw products by the loss's gradient with respect to them.

    With q = z - m - log s, p = exp(q), H the entropy, and dz/draw = k (1 - tanh^2):

        dL/draw = k (1 - tanh^2) [dL/dlogprob onehot - p (dL/dlogprob + dL/dentropy (q + H))]

    rows [3, T] = m, log s, k dL/dlogprob; or [5, T] = those, k dL/dentropy, k (dL/dlogprob + dL/dentropy H). m and
    log s stay apart because the rounding of a large sum would be the same for a token's whole row.
    """
    m, log_s, slope = rows[:3, :, None]
    for first, part, z, p in _blocks(raw, rows.dtype):
        shaping(part, z)
        q = z.sub_(m).sub_(log_s)
        torch.exp(q, out=p)
        d = p.mul_(-slope if len(rows) == 3 else q.mul_(-rows[3, :, None]).sub_(rows[4, :, None]))
        inside, column = _target_columns(part, begin + first, targets)
        d.scatter_add_(1, column, torch.where(inside[:, None], slope, 0.0))
        if shaping.capped:
            bend = shaping(part, z).div_(shaping.outer).square_().neg_().add_(1.0)
            d.mul_(bend)
        part.copy_(d)


def _blocks(raw: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(first column, block, two scratch tensors like it in `dtype`), in blocks that a CPU's cache holds.

    The scratch is the same memory each time: fresh pages cost a CPU more than the arithmetic on them.
    """
    tokens, width = raw.shape
    step = min(max(BLOCK // max(tokens, 1), 64), width)
    scratch = raw.new_empty(2, tokens * step, dtype=dtype)
    for first in range(0, width, step):
        part = raw[:, first : first + step]
        z, p = scratch[:, : part.numel()].unflatten(1, part.shape)
        yield first, part, z, p


def _target_columns(raw: Tensor, begin: int, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a token's target is among these columns [T], and a valid column either way [T, 1]."""
    column = targets - begin
    inside = (column >= 0) & (column < raw.shape[1])
    return inside, column.clamp(0, raw.shape[1] - 1)[:, None]

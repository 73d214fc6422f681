"""Compute the attention of one new token per slot over keys and values in pages; responses share their prompt's pages.

Keys [n, Hk, page, D] and values [n, Hk, page, Dv] are stored in pages of `page` tokens. `Readers` tells which slots
read which pages: all responses to a prompt read the prompt's pages, and every slot reads its own. Scores are

    s = softcap * tanh(scale * q k / softcap), or scale * q k,

weights are exp(s - lse), and the results over prompt and response are merged by their log-sum-exp. Only the tables tell
which keys are seen: shapes, and so launches, do not depend on lengths.

On CUDA (`decode_attention_triton.py`) that is three launches: a prompt's pages are read once for all slots and query
heads of a KV head, in matrix products; long sequences are split among programs; a last kernel merges the parts. On a
CPU `decode_attention_cpu.py` does the same from tables of its own.
"""

import torch
from torch import Tensor

from gspo.kernels.decode_types import Pool
from gspo.kernels.dispatch import Implementation, always, choose, on_tensor_cores, triton_kernel


def decode_attention(
    q: Tensor,
    prompts: Pool,
    answers: Pool,
    positions: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend with q [S, H, D], tokens at `positions` [S] int32 of their sequences; return [S, H, Dv] in q's dtype.

    Every slot is a member of one sequence of `prompts`, which may be empty, and of one of `answers`, the responses so
    far, which holds the new token itself. `window`: positions that a token sees, its own included. Products are in the
    dtype of q, keys and values, sums in float32 (float64 for float64).
    """
    slots, heads, width = q.shape
    for keys, values, readers in (prompts, answers):
        assert keys.shape[:3] == values.shape[:3] and keys.shape[3] == width and heads % keys.shape[1] == 0
        assert keys.is_contiguous() and values.is_contiguous() and q.dtype == keys.dtype == values.dtype
        assert all(x.is_contiguous() and x.dtype == torch.int32 for x in readers)
    assert positions.shape == (slots,) and positions.dtype == torch.int32
    attend = choose(IMPLEMENTATIONS, q)
    return attend(q, prompts, answers, positions, scale, softcap, window)


def plain_decode_attention(
    q: Tensor,
    prompts: Pool,
    answers: Pool,
    positions: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute `decode_attention` in plain PyTorch, over all pages in the tables at once."""
    parts = [_part(q, pool, positions, scale, softcap, window) for pool in (prompts, answers)]
    lse = torch.stack([part[1] for part in parts])
    share = (lse - lse.amax(0)).exp()
    out = sum(part[0] * weight[..., None] for part, weight in zip(parts, share / share.sum(0), strict=True))
    return out.to(q.dtype)


def _part(
    q: Tensor, pool: Pool, positions: Tensor, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return the attention over one pool [S, H, Dv] and its log-sum-exp [S, H], -inf where a slot sees no key."""
    keys, values, (pages, members, sizes, starts) = pool
    slots, heads, _ = q.shape
    kv_heads = keys.shape[1]
    sequence = torch.zeros(slots + 1, dtype=torch.long, device=q.device)  # of each slot; the last is a spare one
    which = torch.arange(len(pages), device=q.device)[:, None].expand_as(members)
    sequence[torch.where(members < 0, slots, members).long()] = which
    sequence = sequence[:slots]

    at = torch.arange(pages.shape[1] * keys.shape[2], device=q.device)
    seen = at < sizes[sequence][:, None]
    if window is not None:
        seen &= at + starts[sequence][:, None] > positions[:, None] - window
    mine = pages[sequence].clamp(0, len(keys) - 1).long()
    k, v = (x[mine].transpose(1, 2).flatten(2, 3) for x in (keys, values))  # [S, Hk, P * page, D]
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = torch.einsum("shd,shkd->shk", q, k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]).exp()
    return torch.einsum("shk,shkd->shd", weights.to(v.dtype), v).to(lse.dtype), lse


IMPLEMENTATIONS = (
    Implementation(on_tensor_cores, triton_kernel("decode_attention_triton", "decode_attention")),
    Implementation(always, lambda q: plain_decode_attention),
)

"""Compute `pairwise.py` in one Triton kernel: one program a group, no exchange between programs, no atomics, float32.

Two passes over the tokens: the first adds up s_ij in registers, the second distributes the gradient to the tokens.
Both compare every token with every fork, N^2 L comparisons; a group's log-probs are read once, its coefficients
written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspo.kernels.pair_settings import PARTS, PairSettings, PairwiseLoss

TILE = 2048  # elements of an N x N x tokens block, where N allows it; eight a thread
LONGEST_BLOCK = 64  # tokens


@triton.jit
def _log1p(x):
    """Return log(1 + x) for x >= 0, accurate also where 1 + x rounds most of x away (Goldberg 1991, theorem 4)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _weight(token, fork, after):
    return tl.where(token > fork, after, tl.where(token == fork, 1.0, 0.0))


@triton.jit(do_not_specialize=["n", "width", "logprobs_group", "logprobs_row", "anchors_group", "anchors_row"])
def pairwise_kernel(
    logprobs_ptr, anchors_ptr, beats_ptr, weights_ptr, forks_ptr, lengths_ptr, coefs_ptr, parts_ptr,
    n, width, logprobs_group, logprobs_row, anchors_group, anchors_row,
    beta, after, share, divisor, ranking_coef, nll_coef,
    LENGTH_NORM: tl.constexpr, NORMALIZER: tl.constexpr, RANKING: tl.constexpr, NLL: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Compute one group. share = 1 / B; beats as bytes; weights_ptr None: every pair weighs 1.

    Tensors of pairs are [j, i]: the threads of a warp differ in i, so each loads and addresses few rows of log-probs.
    """
    group = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)
    real = i < n
    pair = i[None, :] * n + i[:, None]
    both = real[:, None] & real[None, :]
    beats = tl.load(beats_ptr + group * n * n + pair, mask=both, other=0) != 0
    forks = tl.load(forks_ptr + group * n * n + pair, mask=both, other=0).to(tl.int32)
    length = tl.maximum(tl.load(lengths_ptr + group * n + i, mask=real, other=1).to(tl.float32), 1.0)

    logprobs_ptr += group * logprobs_group
    anchors_ptr += group * anchors_group
    sums = tl.zeros([BLOCK_N, BLOCK_N, BLOCK_T], tl.float32)
    raw_sums = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in range(0, width, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = real[:, None] & (t < width)[None, :]
        value = tl.load(logprobs_ptr + i[:, None] * logprobs_row + t[None, :], mask=inside, other=0.0).to(tl.float32)
        anchor = tl.load(anchors_ptr + i[:, None] * anchors_row + t[None, :], mask=inside, other=0.0).to(tl.float32)
        sums += (value - anchor)[None, :, :] * _weight(t[None, None, :], forks[:, :, None], after)
        if NLL:
            raw_sums += value
    s = tl.sum(sums, 2)
    if LENGTH_NORM == "mean":
        s = tl.div_rn(s, tl.broadcast_to(length[None, :], s.shape))
    # beta * s is not formed before the difference: the compiler would fuse the two, and equal s would not give gap 0.
    gap = beta * (s - tl.trans(s))

    one = beats.to(tl.float32)
    pairs = tl.sum(one)
    wins = tl.max(one, 0)
    winners = tl.maximum(tl.sum(wins), 1.0)
    parts_ptr += group * COLUMNS

    z = divisor
    if NORMALIZER == "group":
        z = tl.maximum(pairs, 1.0)
    if NORMALIZER == "sqrt":
        z = tl.sqrt(divisor * tl.maximum(pairs, 1.0))
    weights = one * (share / z)
    if weights_ptr is not None:
        weights *= tl.load(weights_ptr + group * n * n + pair, mask=both, other=0.0).to(tl.float32)
    x = tl.exp(-tl.abs(gap))
    preference = tl.sum(weights * (tl.maximum(-gap, 0.0) + _log1p(x)))
    slope = -weights * (tl.where(gap > 0.0, x, 1.0) / (1.0 + x))

    ranking = 0.0
    if RANKING:
        negated = tl.where(beats, -gap, -float("inf"))
        top = tl.maximum(tl.max(negated, 0), 0.0)
        terms = tl.exp(negated - top[None, :])
        rest = tl.sum(terms, 0)
        own = tl.exp(-top)
        fraction = ranking_coef * share / winners
        ranking = fraction * tl.sum(top + _log1p((own - 1.0) + rest))
        slope -= fraction * terms / (own + rest)[None, :]

    bonus = tl.zeros([BLOCK_N], tl.float32)
    nll = 0.0
    if NLL:
        bonus = -nll_coef * share * wins / (winners * length)
        nll = tl.sum(bonus * tl.sum(raw_sums, 1))

    tl.store(parts_ptr, preference)
    tl.store(parts_ptr + 1, ranking)
    tl.store(parts_ptr + 2, nll)

    h = beta * (slope - tl.trans(slope))
    if LENGTH_NORM == "mean":
        h /= length[None, :]
    coefs_ptr += group * n * width
    for start in range(0, width, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = real[:, None] & (t < width)[None, :]
        coefs = tl.sum(h[:, :, None] * _weight(t[None, None, :], forks[:, :, None], after), 0) + bonus[:, None]
        tl.store(coefs_ptr + i[:, None] * width + t[None, :], coefs.to(coefs_ptr.dtype.element_ty), mask=inside)


def blocks(n: int) -> dict[str, int]:
    """Return the block sizes for N = n responses; they do not depend on the number of tokens: few compilations."""
    rows = max(2, triton.next_power_of_2(n))
    tokens = max(1, min(LONGEST_BLOCK, TILE // rows**2))
    return {"BLOCK_N": rows, "BLOCK_T": tokens, "num_warps": max(1, rows**2 * tokens // 256)}


def pairwise_loss(
    logprobs: Tensor,
    anchors: Tensor,
    beats: Tensor,
    weights: Tensor | None,
    forks: Tensor,
    lengths: Tensor,
    settings: PairSettings,
) -> PairwiseLoss:
    """Compute `pairwise.pairwise_loss`. logprobs and anchors may be slices of wider tensors: nothing is copied."""
    logprobs, anchors = (x if x.stride(-1) == 1 else x.contiguous() for x in (logprobs, anchors))
    g, n, width = logprobs.shape
    coefs = torch.empty(g, n, width, dtype=logprobs.dtype, device=logprobs.device)
    parts = torch.empty(g, len(PARTS), device=logprobs.device)
    with torch.cuda.device_of(logprobs):
        pairwise_kernel[(g,)](
            logprobs, anchors, beats.contiguous().view(torch.uint8), None if weights is None else weights.contiguous(),
            forks.contiguous(), lengths.contiguous(), coefs, parts,
            n, width, *logprobs.stride()[:2], *anchors.stride()[:2],
            settings.beta, settings.after_fork, 1.0 / settings.groups, settings.divisor(n),
            settings.ranking_coef, settings.nll_coef,
            LENGTH_NORM=settings.length_norm, NORMALIZER=settings.normalizer, RANKING=settings.ranking_coef != 0,
            NLL=settings.nll_coef != 0, COLUMNS=len(PARTS), **blocks(n),
        )  # fmt: skip
    return PairwiseLoss(coefs, parts)

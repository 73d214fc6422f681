"""Compute the loss of all pairs of a group, its terms, and its gradient in closed form.

A group's N responses have log-probs l_it and anchors a_it; i and j differ from the token t_ij (their fork) on. The loss
is a function of

    s_ij = b_i sum_t w_ijt (l_it - a_it)      b_i = beta or beta / n_i;  w_ijt = 0, 1, after: before, at, after t_ij
    g_ij = s_ij - s_ji                        the gap

Since s_ij occurs in g_ij and, negated, in g_ji, a loss of the gaps has, with h_ij = dL/dg_ij - dL/dg_ji,

    dL/dl_it = b_i sum_j w_ijt h_ij.

D_ij = 1 where i beats j; I are the responses that beat at least one other; v_ij is a pair's weight; Z normalizes a
group's pairs; B is the number of groups. The terms, and what each adds to dL/dg_ij:

    preference  1/(B Z) sum_ij v_ij D_ij log(1 + e^-g_ij)            -v_ij D_ij sigma(-g_ij) / (B Z)
    ranking     1/(B |I|) sum_i log(1 + sum_j D_ij e^-g_ij)          -D_ij e^-g_ij / (1 + sum_k D_ik e^-g_ik) / (B |I|)
    nll         -1/(B |I|) sum_{i in I} (1/n_i) sum_t l_it           (to dL/dl_it: -1/(B |I| n_i) for i in I)

On CUDA one kernel computes it (`pairwise_triton.py`), elsewhere plain PyTorch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gspo.kernels.dispatch import Implementation, always, choose, on_cuda, triton_kernel
from gspo.kernels.pair_settings import PARTS, PairSettings, PairwiseLoss

MOST_RESPONSES = 64  # N whose N x N comparisons fit in the registers of one program


def pairwise_loss(
    logprobs: Tensor,
    anchors: Tensor,
    beats: Tensor,
    weights: Tensor | None,
    forks: Tensor,
    lengths: Tensor,
    settings: PairSettings,
) -> PairwiseLoss:
    """Return gradient and terms for logprobs, anchors [G, N, L], lengths [G, N], beats [G, N, N] bool, the pairs'
    weights [G, N, N] (None: 1) and forks [G, N, N] in [0, L].

    The caller sums `parts` over groups (so that this is one launch, with no order among programs): the three terms,
    times their coefficients. All L tokens count, so l - a must be 0 after a response's end. The result is not
    differentiable.
    """
    g, n, _ = logprobs.shape
    assert anchors.shape == logprobs.shape, (anchors.shape, logprobs.shape)
    assert lengths.shape == (g, n), lengths.shape
    assert weights is None or weights.shape == beats.shape, weights.shape
    assert beats.shape == forks.shape == (g, n, n) and beats.dtype == torch.bool, (beats.shape, forks.shape)
    with torch.no_grad():
        compute = choose(IMPLEMENTATIONS, logprobs)
        return compute(logprobs, anchors, beats, weights, forks, lengths, settings)


def plain_pairwise_loss(
    logprobs: Tensor,
    anchors: Tensor,
    beats: Tensor,
    weights: Tensor | None,
    forks: Tensor,
    lengths: Tensor,
    settings: PairSettings,
) -> PairwiseLoss:
    """Compute `pairwise_loss` in plain PyTorch on any device; in float64 for float64 log-probs, else in float32."""
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    values, n = logprobs.to(dtype), lengths.clamp_min(1).to(dtype)
    per = n[..., None] if settings.length_norm == "mean" else 1.0
    s = settings.beta * _from_fork(values - anchors.to(dtype), forks, settings.after_fork) / per
    gap = s - s.mT
    parts, slope = _terms_of_gaps(gap, beats, weights, settings)

    wins = beats.any(-1).to(dtype)
    bonus = -settings.nll_coef * wins / (settings.groups * wins.sum(-1, keepdim=True).clamp_min(1) * n)
    parts["nll"] = (bonus * values.sum(-1)).sum(-1)
    coefs = _to_tokens(settings.beta * (slope - slope.mT) / per, forks, settings.after_fork, values.shape[-1])
    coefs = (coefs + bonus[..., None]).to(logprobs.dtype)

    return PairwiseLoss(coefs, torch.stack([parts[name] for name in PARTS], -1))


def _terms_of_gaps(
    gap: Tensor, beats: Tensor, weights: Tensor | None, settings: PairSettings
) -> tuple[dict[str, Tensor], Tensor]:
    """Return preference and ranking [G] by name, and the derivative of their sum with respect to gap [G, N, N]."""
    pairs, own = beats.to(gap), beats.sum((1, 2)).clamp_min(1).to(gap)
    weights = pairs if weights is None else pairs * weights.to(gap)
    z = torch.full_like(own, settings.divisor(gap.shape[-1]))
    z = {"group": own, "sqrt": (z * own).sqrt()}.get(settings.normalizer, z)
    weights = weights / (settings.groups * z[:, None, None])
    preference = (weights * F.softplus(-gap)).sum((1, 2))
    slope = -weights * torch.sigmoid(-gap)

    negated = (-gap).masked_fill(~beats, -torch.inf)
    total = F.pad(negated, (1, 0)).logsumexp(-1)  # 0 for a response that beats no other
    share = settings.ranking_coef / (settings.groups * beats.any(-1).sum(-1).clamp_min(1).to(gap))
    slope = slope - share[:, None, None] * (negated - total[..., None]).exp()
    return {"preference": preference, "ranking": share * total.sum(-1)}, slope


def _from_fork(values: Tensor, forks: Tensor, after: float) -> Tensor:
    """Return [G, N, N]: the value [G, N, L] of i at its fork from j, plus `after` times the sum of those after it."""
    padded = F.pad(values, (0, 2))
    following = padded.flip(-1).cumsum(-1).flip(-1)
    return padded.gather(-1, forks) + after * following.gather(-1, forks + 1)


def _to_tokens(slopes: Tensor, forks: Tensor, after: float, width: int) -> Tensor:
    """Apply the transpose of `_from_fork` to slopes [G, N, N]: -> [G, N, L]."""
    at = slopes.new_zeros(*slopes.shape[:2], width + 1).scatter_add_(-1, forks, slopes)
    before = at.cumsum(-1) - at
    return (at + after * before)[..., :width]


def _fits_a_program(logprobs: Tensor) -> bool:
    """Return whether the Triton kernel takes log-probs [G, N, L]."""
    return on_cuda(logprobs) and logprobs.shape[1] <= MOST_RESPONSES


IMPLEMENTATIONS = (
    Implementation(_fits_a_program, triton_kernel("pairwise_triton", "pairwise_loss")),
    Implementation(always, lambda logprobs: plain_pairwise_loss),
)

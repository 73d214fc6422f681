"""Compute the gaps of implicit rewards between the responses of a group, and the values of their beginnings.

Pure functions; the notation is that of objective.py, which makes losses of them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gspo import config
from gspo.types import Groups


@dataclass(frozen=True)
class Counts:
    """What a micro-batch must know about the whole mini-batch."""

    groups: int  # B, groups in the mini-batch this gradient step is for, over all ranks
    pairs_per_group: float  # mean over the batch


def from_fork(values: Tensor, forks: Tensor, after: float) -> Tensor:
    """Sum the values of i from the fork with j: values [G, N, L], forks [G, N, N] -> [G, N, N], the value at the fork
    plus `after` times those that follow."""
    nothing = values.new_zeros(*values.shape[:2], 1)
    total = torch.cat([nothing, values.cumsum(-1)], -1)  # before each position
    at = torch.cat([values, nothing], -1).gather(-1, forks)
    behind = total[..., -1:] - total.gather(-1, (forks + 1).clamp_max(values.shape[-1]))
    return at + after * behind


def gaps(logprobs: Tensor, groups: Groups, cfg: config.Objective) -> Tensor:
    """Return s_ij - s_ji [G, N, N], the log-odds that i is preferred to j. n_i is 1 (`sum`) or the length (`mean`).

    DPO, arXiv 2305.18290, eq. 5, counted from the fork.
    """
    s = cfg.preference_beta * from_fork(logprobs - groups.anchors.to(logprobs), groups.forks, cfg.after_fork)
    if cfg.length_norm == "mean":
        s = s / groups.lengths.clamp_min(1).to(s)[:, :, None]
    return s - s.transpose(1, 2)


def whole_gaps(logprobs: Tensor, groups: Groups, cfg: config.Objective) -> Tensor:
    """Return the gaps of whole responses, s_ij - s_ji at `after_fork` 1, [G, N, N]."""
    return gaps(logprobs, groups, replace(cfg, after_fork=1.0))


def prefix_values(groups: Groups) -> Tensor:
    """Return V_i(t) [G, N, L + 1], the mean reward of the group's responses that begin with the first t tokens of i.

    It estimates the reward to be expected there: the group's mean at t = 0, r_i where no other response is left and
    from the end of i on. It changes only at forks.
    """
    rewards, ends = groups.rewards.double(), groups.lengths.clamp_max(groups.anchors.shape[-1])
    nothing = rewards.new_zeros(*rewards.shape, groups.anchors.shape[-1] + 1)
    # At t, those that part from i there; then those that part there or later: they share its first t tokens.
    total = nothing.scatter_add(-1, groups.forks, rewards[:, None, :].expand(groups.forks.shape))
    count = nothing.scatter_add(-1, groups.forks, torch.ones_like(rewards)[:, None, :].expand(groups.forks.shape))
    total, count = (x.flip(-1).cumsum(-1).flip(-1) for x in (total, count))
    ended = torch.arange(nothing.shape[-1], device=ends.device) >= ends[..., None]
    return torch.where(ended, rewards[..., None], total / count.clamp_min(1))

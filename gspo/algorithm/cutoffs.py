"""Decide what is learned from responses that were cut off at `rollout.max_new_tokens` (`rollout.on_cutoff`)."""

import torch
from torch import Tensor

from gspo.config import Config
from gspo.errors import UserError

GAP = 1e-3  # by how much more than the margin a response without an end stays behind those that have one


def check_cutoffs(cfg: Config) -> None:
    """Raise UserError where the objective cannot do what `rollout.on_cutoff` asks for."""
    how, algorithm = cfg.rollout.on_cutoff, cfg.objective.algorithm
    why = {
        "spin": "spin prefers the gold solution to every sample, whatever its reward",
        "maxrl": "maxrl divides by the mean reward, which penalties would make smaller or negative",
    }
    if algorithm in why and (how == "lose" or (how == "skip" and algorithm == "spin")):
        raise UserError(
            f"rollout.on_cutoff = {how} does not go with objective.algorithm = {algorithm}: {why[algorithm]}."
        )


def learned_rewards(rewards: Tensor, finished: Tensor, how: str, margin: float) -> Tensor:
    """Return the rewards [G, N] that the objective sees; finished [G, N] bool tells which responses have an end.

    keep: as scored. lose: those without an end are lowered, all of a group by the same, until the best of them is
    behind the worst that ended by more than the margin. skip: they get the mean of those that ended, so that they
    change no mean and have no advantage. A group in which none or all ended stays as it is, but with skip and none
    ended its responses score alike.
    """
    if how == "keep":
        return rewards
    scores, ended, some = rewards.double(), finished, finished.any(1) & ~finished.all(1)
    if how == "lose":
        worst = scores.masked_fill(~ended, torch.inf).amin(1)
        best_cut = scores.masked_fill(ended, -torch.inf).amax(1)
        lower = torch.where(some, (best_cut - worst + margin + GAP).clamp_min(0.0), 0.0)
        return torch.where(ended, scores, scores - lower[:, None]).to(rewards.dtype)
    count = ended.sum(1)
    mean = torch.where(count > 0, scores.masked_fill(~ended, 0.0).sum(1) / count.clamp_min(1), scores.mean(1))
    return torch.where(ended, scores, mean[:, None]).to(rewards.dtype)


def learned_pairs(beats: Tensor, finished: Tensor, how: str) -> Tensor:
    """Return the pairs [G, N, N] that are learned from; with skip, none has a response without an end."""
    return beats & finished[:, :, None] & finished[:, None, :] if how == "skip" else beats

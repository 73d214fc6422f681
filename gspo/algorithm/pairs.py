"""Rewards -> who beats whom; responses -> where they part."""

import torch
from torch import Tensor

TOLERANCE = 1e-6  # makes 0.8 - 0.7 > 0.1 and 1.0 - 0.9 > 0.1 agree: both are ties at margin 0.1


def preferences(rewards: Tensor, margin: float) -> Tensor:
    """[G, N] rewards -> [G, N, N] bool, `[g, i, j]` true when r_i - r_j > margin. Ties never pair.

    With the seed's levels (1.0, 0.5, 0.1, 0.0) and margin 0.1, 0.1 against 0.0 is not a pair: the seed's `>` is strict.
    """
    rewards = rewards.double()
    return rewards[:, :, None] - rewards[:, None, :] > margin + TOLERANCE


def chosen_rejected(beats: Tensor, rewards: Tensor) -> list[tuple[int, int, float]]:
    """Pairs of one group, beats [N, N] and rewards [N] -> [(winner, loser, reward gap)], widest gap first."""
    found = [(int(i), int(j), float(rewards[i] - rewards[j])) for i, j in torch.nonzero(beats).tolist()]
    return sorted(found, key=lambda pair: (-pair[2], pair[0], pair[1]))


def forks(tokens: Tensor, lengths: Tensor) -> Tensor:
    """tokens [G, N, L], lengths [G, N] -> [G, N, N] int64: the first position at which responses i and j differ.

    Where one is the beginning of the other, its end; of i and i, its length.
    """
    real = torch.arange(tokens.shape[2], device=tokens.device) < lengths[..., None]
    filled = torch.where(real, tokens, -1)
    alike = (filled[:, :, None] == filled[:, None, :]) & real[:, :, None]
    return alike.cumprod(-1).sum(-1)

"""Compare responses: which beats which by reward, and at which token two of them part."""

import torch
from torch import Tensor

TOLERANCE = 1e-6  # makes 0.8 - 0.7 > 0.1 and 1.0 - 0.9 > 0.1 agree: both are ties at margin 0.1


def preferences(rewards: Tensor, margin: float) -> Tensor:
    """Return which response beats which: rewards [G, N] -> [G, N, N] bool, `[g, i, j]` true when r_i - r_j > margin.

    Ties never pair. At margin 0.1 the rewards 0.1 and 0.0 are no pair: the `>` is strict.
    """
    rewards = rewards.double()
    return rewards[:, :, None] - rewards[:, None, :] > margin + TOLERANCE


def has_contrast(rewards: Tensor, margin: float) -> Tensor:
    """Return which groups have two rewards further apart than the margin: [G, N] -> [G] bool; else none is a pair."""
    rewards = rewards.double()
    return rewards.amax(1) - rewards.amin(1) > margin + TOLERANCE


def chosen_rejected(beats: Tensor, rewards: Tensor) -> list[tuple[int, int, float]]:
    """Return the pairs of one group as [(winner, loser, reward gap)], widest gap first; beats [N, N], rewards [N]."""
    found = [(int(i), int(j), float(rewards[i] - rewards[j])) for i, j in torch.nonzero(beats).tolist()]
    return sorted(found, key=lambda pair: (-pair[2], pair[0], pair[1]))


def forks(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return the first position at which responses i and j differ: tokens [G, N, L], lengths [G, N] -> [G, N, N] int64.

    Where one response is the beginning of the other, that is its end; of i with itself, its length.
    """
    real = torch.arange(tokens.shape[2], device=tokens.device) < lengths[..., None]
    filled = torch.where(real, tokens, -1)
    alike = (filled[:, :, None] == filled[:, None, :]) & real[:, :, None]
    return alike.cumprod(-1).sum(-1)


def branch_weights(places: Tensor, trunks: int, width: int) -> Tensor:
    """Return how much the gradient of each token counts in a tree of T trunks, so that it is a flat group's in
    expectation: places [G, N, B], where each leaf's own path branches (its length: nowhere) -> [G, N, width].

    Behind a branching place more pairs of leaves say something about a token than before it (docs/algorithm.md). Of a
    group's N(N-1)/2 pairs those of different trunks part anywhere, and T (B + 1 - k) part behind the k-th place; a
    token counts as all pairs over those that part before or at it.
    """
    n, b = places.shape[1:]
    pairs = n * (n - 1) / 2
    behind_each = trunks * torch.arange(b, 0, -1, device=places.device, dtype=torch.float64)
    position = torch.arange(width, device=places.device)
    behind = ((position[:, None] >= places[..., None, :]) * behind_each).sum(-1)  # [G, N, width]
    return (pairs / (pairs - behind_each.sum() + behind)).float()

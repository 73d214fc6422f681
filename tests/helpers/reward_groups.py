"""Groups of random log-probs and rewards for the tests of objectives, in float64."""

import torch

from gspo.algorithm.objective import (
    Counts,
    Groups,
)
from gspo.algorithm.pairs import preferences

G, N = 3, 5

COUNTS = Counts(groups=G, pairs_per_group=4.0)

LEVELS = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)


def a_batch(margin=0.1, seed=0):
    """Responses told by one number each, as if they had one token."""
    g = torch.Generator().manual_seed(seed)
    logprobs = -10 * torch.rand(G, N, 1, generator=g, dtype=torch.float64)
    anchors = logprobs + torch.randn(G, N, 1, generator=g, dtype=torch.float64)
    rewards = LEVELS[torch.randint(0, 4, (G, N), generator=g)]
    rewards[0] = 0.5  # a group without a pair
    lengths = torch.randint(1, 9, (G, N), generator=g)
    return logprobs, Groups(anchors, rewards, preferences(rewards, margin), at_once(G, N), lengths)


def at_once(g, n):
    """Responses of one token, at which all of them part; each is alike with itself up to its end."""
    return torch.eye(n, dtype=torch.long).expand(g, n, n)

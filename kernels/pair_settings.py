"""What a pairwise loss is given and what it gives back: shared by pairwise.py and its Triton kernel."""

from typing import Literal, NamedTuple

from torch import Tensor

PARTS = ("preference", "ranking", "nll", "pairs", "ordered", "gap_sum", "gap_squares")


class PairSettings(NamedTuple):
    """Which loss. `groups` (B) and `pairs_per_group` are those of the whole batch that these groups are a part of."""

    beta: float
    groups: int
    pairs_per_group: float = 1.0
    after_fork: float = 1.0
    length_norm: Literal["sum", "mean"] = "sum"
    pair_weight: Literal["one", "gap"] = "one"
    normalizer: Literal["constant", "batch", "group", "sqrt"] = "constant"
    ranking_coef: float = 0.0
    nll_coef: float = 0.0

    def divisor(self, n: int) -> float:
        """Z of N = n responses as far as it does not depend on the group: N(N-1)/2, or the batch's pairs a group."""
        return max(self.pairs_per_group, 1e-12) if self.normalizer == "batch" else max(n * (n - 1) / 2, 1.0)


class PairwiseLoss(NamedTuple):
    """(coefficients.detach() * logprobs).sum() has the loss's gradient."""

    coefficients: Tensor  # [G, N, L] dL/dl, in the log-probs' dtype
    parts: Tensor  # [G, 7] each group's share of `PARTS`, at least float32

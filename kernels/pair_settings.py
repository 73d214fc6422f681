"""Define the settings and the result of a pairwise loss, for pairwise.py and its Triton kernel."""

from typing import Literal, NamedTuple

from torch import Tensor

PARTS = ("preference", "ranking", "nll")


class PairSettings(NamedTuple):
    """The loss. `groups` (B) and `pairs_per_group` are those of the whole batch, of which these groups are a part."""

    beta: float
    groups: int
    pairs_per_group: float = 1.0
    after_fork: float = 1.0
    length_norm: Literal["sum", "mean"] = "sum"
    normalizer: Literal["constant", "batch", "group", "sqrt"] = "constant"
    ranking_coef: float = 0.0
    nll_coef: float = 0.0

    def divisor(self, n: int) -> float:
        """Return the part of Z for N = n responses that is the same for all groups: N(N-1)/2, or pairs_per_group."""
        return max(self.pairs_per_group, 1e-12) if self.normalizer == "batch" else max(n * (n - 1) / 2, 1.0)


class PairwiseLoss(NamedTuple):
    """The gradient, and the terms. (coefficients.detach() * logprobs).sum() has the loss's gradient."""

    coefficients: Tensor  # [G, N, L] dL/dl, in the log-probs' dtype
    parts: Tensor  # [G, 3] each group's share of the terms `PARTS`, at least float32

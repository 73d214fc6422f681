"""Say where a group branches: a tree of whole responses (trunks), and branches that begin as one of them does.

A branch copies the tokens of its trunk before its place and is sampled from there. Where the decision to branch at a
place looks only at tokens before it, every leaf is distributed as the policy, and the leaves that share a beginning are
independent given it. Where it looks at the whole trunk, neither holds (docs/algorithm.md).
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gspo import config
from gspo.errors import UserError
from gspo.rollout.engine_interface import Requests, Results
from gspo.types import Rollout

At = Literal["entropy", "even", "most_uncertain", "fractions"]
FIRST_EVERY = {"entropy": 1.0, "even": 8.0}  # nats, tokens: in the first step, where `rollout.branch_every` is not set


@dataclass(frozen=True)
class Tree:
    """T trunks with B branches each: N = T * (1 + B) leaves; a trunk's branches follow it."""

    trunks: int
    branches: int
    at: At = "entropy"
    every: float = 1.0

    @classmethod
    def of(cls, cfg: config.Rollout, length: float = 0.0, entropy: float = 0.0) -> "Tree | None":
        """Return the tree of a step; None where all responses are independent. UserError where n is no such number.

        `length` and `entropy` are those of the last step's mean response, in tokens and nats; 0: not known.
        """
        if cfg.trunks is None or cfg.trunks == cfg.n:
            return None
        if cfg.n % cfg.trunks:
            raise UserError(
                f"rollout.n = {cfg.n} is no multiple of rollout.trunks = {cfg.trunks}: every trunk gets equally many "
                "branches, n = trunks * (1 + branches). Choose a divisor of n, or leave rollout.trunks empty."
            )
        leaves = cfg.n // cfg.trunks
        known = {"entropy": entropy, "even": length}.get(cfg.branch_at, 0.0) / leaves
        every = cfg.branch_every or known or FIRST_EVERY.get(cfg.branch_at, 1.0)
        return cls(cfg.trunks, leaves - 1, cfg.branch_at, every)

    @property
    def leaves(self) -> int:
        return self.trunks * (1 + self.branches)

    def trunk_rows(self, groups: int) -> Tensor:
        """Return the rows of the trunks among the N rows of each of so many groups, [groups * T]."""
        return torch.arange(0, groups * self.leaves, 1 + self.branches)

    @property
    def looks_ahead(self) -> bool:
        """Whether a place depends on tokens behind it."""
        return self.at in ("most_uncertain", "fractions")

    def leaf_places(self, rollout: Rollout) -> Tensor | None:
        """Return where each leaf's own path would branch [G, N, B], which the weights of its tokens follow from.

        None where no weights are derived: for a tree that looks ahead, and with gold solutions among the responses.
        """
        if self.looks_ahead or not bool(rollout.sampled.all()):
            return None
        found = self.places(rollout.entropy.flatten(0, 1), rollout.lengths.flatten())
        return found.view(*rollout.lengths.shape, self.branches)

    def places(self, entropy: Tensor, lengths: Tensor) -> Tensor:
        """Return the places at which responses branch, in ascending order: entropy [R, L], lengths [R] -> [R, B].

        A place is the position of the first token that differs, 1 or more; a response's length where it has no k-th
        place, as it ended before.

        entropy         the first position at which the entropy of positions 1, 2, ... has summed up to k * every
        even            position k * every, rounded up
        most_uncertain  the B positions of the largest entropy in the whole response, the earlier of equals
        fractions       k / (B + 1) of the response's own length, rounded up
        """
        k = torch.arange(1, self.branches + 1, device=lengths.device)
        end = lengths[:, None]
        position = torch.arange(entropy.shape[1], device=lengths.device)
        if self.at == "fractions":
            found = (k * end + self.branches) // (self.branches + 1)
        elif self.at == "most_uncertain":
            inside = (position >= 1) & (position < end)
            order = entropy.masked_fill(~inside, -1.0).argsort(dim=1, descending=True, stable=True)[:, : self.branches]
            found = torch.where(inside.gather(1, order), order, end)
            found = torch.cat([found, end.expand(-1, self.branches - found.shape[1])], 1).sort(1).values
        elif self.at == "even":
            found = (k * self.every).ceil().long().expand(len(lengths), -1)
        else:
            inside = (position >= 1) & (position < end)
            total = entropy.double().masked_fill(~inside, 0.0).cumsum(1)
            found = torch.searchsorted(total, (k * self.every).double().expand(len(lengths), -1).contiguous())
        return torch.where((found >= 1) & (found < end), found, end)


@dataclass(frozen=True)
class Branches:
    """What is left to sample when the trunks have ended."""

    requests: Requests  # a prompt is a group's prompt and the beginning of a trunk, up to its last place
    rows: Tensor  # the branches' rows among those of all leaves, in the order of the requests'
    group: list[int]  # of each prompt of the requests


def grow_branches(tree: Tree, whole: Requests, leaves: Results, places: Tensor) -> Branches:
    """Copy the beginnings of all branches from their trunks into `leaves`, and return what to sample behind them.

    `whole` requests all leaves; the trunks' rows of `leaves` are final; places [trunks, B]. A branch that has no place,
    as its trunk ended before, copies the whole trunk.
    """
    trunk = tree.trunk_rows(len(whole.prompts)).to(places.device)
    rows = (trunk[:, None] + torch.arange(1, tree.branches + 1, device=places.device)).flatten()
    source, copied = trunk.repeat_interleave(tree.branches), places.flatten()
    behind = torch.arange(leaves.tokens.shape[1], device=places.device) >= copied[:, None]
    for x, padding in ((leaves.tokens, whole.pad_id), (leaves.logprobs, 0.0), (leaves.entropy, 0.0)):
        x[rows] = x[source].masked_fill(behind, padding)
    leaves.lengths[rows] = copied
    ended = copied == leaves.lengths[source]
    leaves.finished[rows] = ended & leaves.finished[source]

    branches: dict[int, list[tuple[int, int]]] = defaultdict(list)  # trunk -> row and place of each
    for row, t, place, over in zip(*(x.tolist() for x in (rows, source, copied, ended)), strict=True):
        if not over:
            branches[t].append((row, place))
    order = torch.tensor([row for found in branches.values() for row, _ in found], dtype=torch.long)
    group = [t // tree.leaves for t in branches]
    last = [max(place for _, place in found) for found in branches.values()]
    tokens = leaves.tokens.tolist()
    requests = replace(
        whole,
        prompts=[(*whole.prompts[g], *tokens[t][:end]) for g, t, end in zip(group, branches, last, strict=True)],
        counts=[len(found) for found in branches.values()],
        begun=[place for found in branches.values() for _, place in found],
        keys=whole.keys[order],
        limits=whole.limits[order],
        trunks=tuple(t // (1 + tree.branches) for t in branches),
    )
    return Branches(requests, order.to(places.device), group)

"""Assign groups to ranks, mini-batches and micro-batches. Work is measured in packed tokens."""

import heapq
from itertools import groupby
from typing import Literal

from gspo.types import Rollout

Row = tuple[int, int]  # (group, response)
MOST_TOKENS = 16384  # of a micro-batch, where `optim.micro_batch_tokens` is auto and memory/ has chosen no fewer


def token_budget(micro_batch_tokens: int | Literal["auto"]) -> int:
    """Return the most tokens of a micro-batch by the setting."""
    return MOST_TOKENS if micro_batch_tokens == "auto" else micro_batch_tokens


def packed_tokens(rollout: Rollout, rows: list[Row], lengths: list[list[int]]) -> int:
    """Count the tokens of one forward over these rows: every response, and the prompt of every group once."""
    prompts = sum(len(rollout.prompts[g].ids) for g in {g for g, _ in rows})
    return prompts + sum(lengths[g][i] for g, i in rows)


def group_tokens(rollout: Rollout) -> list[int]:
    """Count the packed tokens of each of the G groups: its prompt once, and every response but what a branch copied."""
    own = (rollout.lengths - rollout.copied).sum(1).tolist()
    return [len(p.ids) + n for p, n in zip(rollout.prompts, own, strict=True)]


def minibatch_of(place: int, groups: int, minibatches: int) -> int:
    """Return the mini-batch of a place in a global batch of `groups`: consecutive places, as many in each, to one."""
    return place * minibatches // groups


def assign(tokens: list[int], minibatches: int, ranks: int) -> list[int]:
    """Assign the groups of a global batch, given by their packed tokens -> the rank that trains on each.

    Each mini-batch is balanced by itself, as all ranks wait for each other at its optimizer step: longest group first,
    to the rank with the fewest tokens of the mini-batch so far, among equals the fewest of the whole batch. No rank
    gets more than the mean plus one group, nor more than 4/3 of what the best assignment gives its fullest rank
    (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969). A rank may get nothing.
    """
    owners, total = [0] * len(tokens), [0] * ranks
    for _, places in groupby(range(len(tokens)), key=lambda p: minibatch_of(p, len(tokens), minibatches)):
        loads = sorted((0, total[rank], rank) for rank in range(ranks))
        for p in sorted(places, key=lambda p: (-tokens[p], p)):
            load, before, owners[p] = loads[0]
            total[owners[p]] = before + tokens[p]
            heapq.heapreplace(loads, (load + tokens[p], total[owners[p]], owners[p]))
    return owners


def imbalance(tokens: list[int], owners: list[int], minibatches: int, ranks: int) -> float:
    """Return the tokens of the fullest rank, summed over mini-batches, / a rank's mean; 1.0: no rank waits."""
    loads = [[0] * ranks for _ in range(minibatches)]
    for p, (count, owner) in enumerate(zip(tokens, owners, strict=True)):
        loads[minibatch_of(p, len(tokens), minibatches)][owner] += count
    return sum(map(max, loads)) * ranks / sum(tokens)


def micro_batches(
    rollout: Rollout, groups: list[int], *, budget: int, max_rows: int | None, whole_groups: bool
) -> list[list[Row]] | None:
    """Cut the rows of `groups`, in order, into micro-batches of at most `budget` packed tokens and `max_rows` rows.

    A single row may exceed the budget (it cannot be cut). With `whole_groups` no group is cut; None where some group
    does not fit.
    """
    n = rollout.tokens.shape[1]
    lengths = (rollout.lengths - rollout.copied if whole_groups else rollout.lengths).tolist()
    units = (
        [[(g, i) for i in range(n)] for g in groups] if whole_groups else [[(g, i)] for g in groups for i in range(n)]
    )
    parts: list[list[Row]] = []
    tokens = 0  # of the last micro-batch
    for unit in units:
        group, alone = unit[0][0], packed_tokens(rollout, unit, lengths)
        if whole_groups and (alone > budget or len(unit) > (max_rows or n)):
            return None
        shared = len(rollout.prompts[group].ids) if parts and parts[-1][-1][0] == group else 0
        more = alone - shared
        if parts and tokens + more <= budget and (max_rows is None or len(parts[-1]) + len(unit) <= max_rows):
            parts[-1] += unit
            tokens += more
        else:
            parts.append(unit)
            tokens = alone
    return parts

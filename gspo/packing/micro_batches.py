"""Which rank trains on which groups, in which mini- and micro-batches. Work is measured in packed tokens."""

import heapq
from itertools import groupby

from gspo.types import Rollout

Row = tuple[int, int]  # (group, response)


def packed_tokens(rollout: Rollout, rows: list[Row], lengths: list[list[int]]) -> int:
    """Tokens of one forward over these rows: every response, and the prompt of every group once."""
    prompts = sum(len(rollout.prompts[g].ids) for g in {g for g, _ in rows})
    return prompts + sum(lengths[g][i] for g, i in rows)


def group_tokens(rollout: Rollout) -> list[int]:
    """Packed tokens of each of the G groups: its prompt once, and every response."""
    return [len(p.ids) + n for p, n in zip(rollout.prompts, rollout.lengths.sum(1).tolist(), strict=True)]


def minibatch_of(place: int, groups: int, minibatches: int) -> int:
    """The mini-batch of a place in a global batch of so many groups: stretches of it, alike in length to one group."""
    return place * minibatches // groups


def assign(tokens: list[int], minibatches: int, ranks: int) -> list[int]:
    """Packed tokens of a global batch's groups -> the rank that trains on each.

    Each mini-batch is balanced by itself, as all ranks meet at its optimizer step: longest group first, to the rank
    with the least tokens of the mini-batch so far, among equals to the one with the least of the whole batch. No rank
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
    """Tokens of the fullest rank, summed over mini-batches, / a rank's mean: 1.0 where no rank waits for another."""
    loads = [[0] * ranks for _ in range(minibatches)]
    for p, (count, owner) in enumerate(zip(tokens, owners, strict=True)):
        loads[minibatch_of(p, len(tokens), minibatches)][owner] += count
    return sum(map(max, loads)) * ranks / sum(tokens)


def micro_batches(
    rollout: Rollout, groups: list[int], *, budget: int, max_rows: int | None, whole_groups: bool
) -> list[list[Row]] | None:
    """Rows of `groups`, cut in order so that each part holds at most `budget` packed tokens and `max_rows` rows.

    A row alone may exceed the budget (it cannot be cut). With `whole_groups` a part holds whole groups only, and the
    answer is None when some group does not fit.
    """
    n = rollout.tokens.shape[1]
    lengths = rollout.lengths.tolist()
    units = (
        [[(g, i) for i in range(n)] for g in groups] if whole_groups else [[(g, i)] for g in groups for i in range(n)]
    )
    parts: list[list[Row]] = []
    tokens = 0  # of the last part
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

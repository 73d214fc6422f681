"""Groups to ranks, evenly in every mini-batch; a rollout into micro-batches, every row once, within the budget."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspo.packing.micro_batches import assign, group_tokens, imbalance, micro_batches, minibatch_of, packed_tokens
from gspo.types import Prompt, Rollout


def a_rollout(prompt_lengths, lengths):
    """Tokens number themselves: 100 g + 10 i + t at position t of response i of group g."""
    lengths = torch.tensor(lengths)
    g, i, t = torch.meshgrid(*(torch.arange(k) for k in (*lengths.shape, int(lengths.max()))), indexing="ij")
    prompts = [Prompt(k, tuple(range(n)), f"p{k}", "", "") for k, n in enumerate(prompt_lengths)]
    zeros = torch.zeros(g.shape)
    return Rollout(prompts, 100 * g + 10 * i + t, lengths, zeros, zeros, lengths > 0, [[""] * g.shape[1]] * len(g))


ROLLOUT = a_rollout([3, 5, 2], [[1, 4], [2, 2], [6, 1]])


def test_packed_tokens_by_hand():
    lengths = ROLLOUT.lengths.tolist()
    assert packed_tokens(ROLLOUT, [(0, 0)], lengths) == 3 + 1
    assert packed_tokens(ROLLOUT, [(0, 1), (1, 0)], lengths) == (3 + 4) + (5 + 2)
    assert packed_tokens(ROLLOUT, [(g, i) for g in range(3) for i in range(2)], lengths) == 10 + 16
    assert group_tokens(ROLLOUT) == [3 + 5, 5 + 4, 2 + 7]


@pytest.mark.parametrize(
    ("groups", "minibatches", "expected"),
    [(6, 2, [0, 0, 0, 1, 1, 1]), (5, 2, [0, 0, 0, 1, 1]), (2, 3, [0, 1]), (3, 1, [0, 0, 0])],
)
def test_mini_batches_by_hand(groups, minibatches, expected):
    assert [minibatch_of(p, groups, minibatches) for p in range(groups)] == expected


@pytest.mark.parametrize(
    ("tokens", "minibatches", "ranks", "owners", "uneven"),
    [
        ([5, 4, 3, 3, 3], 1, 2, [0, 1, 1, 0, 1], 10 / 9),  # 5 and 4; 4 + 3; 5 + 3; 7 + 3
        ([3, 3, 4, 3, 5], 1, 2, [1, 0, 1, 1, 0], 10 / 9),  # the same groups in another order
        ([9, 1, 1, 9], 1, 2, [0, 0, 1, 1], 1.0),
        ([9, 1, 1, 9], 2, 2, [0, 1, 0, 1], 18 / 10),  # no choice within 9, 1; then the long one to who has had less
        ([4, 4, 4, 4], 4, 4, [0, 1, 2, 3], 4.0),  # one group a mini-batch: all wait, but each has worked once
        ([2, 7], 1, 3, [1, 0], 7 / 3),
        ([6], 3, 1, [0], 1.0),
    ],
)
def test_shares_by_hand(tokens, minibatches, ranks, owners, uneven):
    assert assign(tokens, minibatches, ranks) == owners
    assert imbalance(tokens, owners, minibatches, ranks) == pytest.approx(uneven)


@given(st.lists(st.integers(2, 50), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 9))
def test_in_every_mini_batch_no_rank_has_more_than_the_mean_and_one_group(tokens, minibatches, ranks):
    owners = assign(tokens, minibatches, ranks)
    assert len(owners) == len(tokens) and all(0 <= owner < ranks for owner in owners)
    fullest = 0
    for k in range(minibatches):
        members = [p for p in range(len(tokens)) if minibatch_of(p, len(tokens), minibatches) == k]
        loads = [sum(tokens[p] for p in members if owners[p] == rank) for rank in range(ranks)]
        if members:
            assert max(loads) <= sum(loads) / ranks + max(tokens[p] for p in members)
        fullest += max(loads)
    assert imbalance(tokens, owners, minibatches, ranks) == pytest.approx(fullest * ranks / sum(tokens))


@given(st.lists(st.integers(2, 50), min_size=1, max_size=6), st.integers(2, 3))
def test_no_rank_has_more_than_four_thirds_of_the_best_possible(tokens, ranks):
    every = (imbalance(tokens, owners, 1, ranks) for owners in product(range(ranks), repeat=len(tokens)))
    assert imbalance(tokens, assign(tokens, 1, ranks), 1, ranks) <= (4 / 3) * min(every) + 1e-9


@pytest.mark.parametrize(
    ("budget", "max_rows", "whole", "parts"),
    [
        # group by group 3+1+4 = 8, 5+2+2 = 9, 2+6+1 = 9
        (26, None, False, [[(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]]),
        (25, None, False, [[(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)], [(2, 1)]]),
        (15, None, False, [[(0, 0), (0, 1), (1, 0)], [(1, 1), (2, 0)], [(2, 1)]]),  # 8+7; 7+8; the prompt again: 2+1
        (8, None, False, [[(0, 0), (0, 1)], [(1, 0)], [(1, 1)], [(2, 0)], [(2, 1)]]),
        (1, None, False, [[(0, 0)], [(0, 1)], [(1, 0)], [(1, 1)], [(2, 0)], [(2, 1)]]),
        (999, 4, False, [[(0, 0), (0, 1), (1, 0), (1, 1)], [(2, 0), (2, 1)]]),
        (999, 4, True, [[(0, 0), (0, 1), (1, 0), (1, 1)], [(2, 0), (2, 1)]]),
        (999, 3, True, [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(2, 0), (2, 1)]]),
        (17, None, True, [[(0, 0), (0, 1), (1, 0), (1, 1)], [(2, 0), (2, 1)]]),
        (16, None, True, [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(2, 0), (2, 1)]]),
        (9, None, True, [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(2, 0), (2, 1)]]),
        (8, None, True, None),  # the later groups take 9
        (999, 1, True, None),
    ],
)
def test_parts_by_hand(budget, max_rows, whole, parts):
    assert micro_batches(ROLLOUT, [0, 1, 2], budget=budget, max_rows=max_rows, whole_groups=whole) == parts


def test_only_the_groups_asked_for_in_their_order():
    parts = micro_batches(ROLLOUT, [2, 0], budget=16, max_rows=None, whole_groups=True)
    assert parts == [[(2, 0), (2, 1)], [(0, 0), (0, 1)]]
    # a group that does not fit matters only when it is among them
    assert micro_batches(ROLLOUT, [0], budget=8, max_rows=None, whole_groups=True) is not None
    assert micro_batches(ROLLOUT, [], budget=1, max_rows=None, whole_groups=True) == []


@given(st.data())
def test_every_row_once_in_order_and_within_the_limits(data):
    groups, n = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.lists(st.integers(1, 9), min_size=n, max_size=n), min_size=groups, max_size=groups))
    rollout = a_rollout(data.draw(st.lists(st.integers(1, 9), min_size=groups, max_size=groups)), lengths)
    budget, max_rows = data.draw(st.integers(1, 90)), data.draw(st.none() | st.integers(1, 9))
    whole = data.draw(st.booleans())
    parts = micro_batches(rollout, list(range(groups)), budget=budget, max_rows=max_rows, whole_groups=whole)

    def fits(rows):
        return packed_tokens(rollout, rows, lengths) <= budget and len(rows) <= (max_rows or 999)

    everything = [(g, i) for g in range(groups) for i in range(n)]
    unit = n if whole else 1
    units = [everything[k : k + unit] for k in range(0, len(everything), unit)]
    if whole and not all(map(fits, units)):
        assert parts is None
        return
    assert [row for part in parts for row in part] == everything
    for part, following in zip(parts, [*parts[1:], []], strict=True):
        assert fits(part) or len(part) == 1
        assert len(part) % unit == 0
        assert not following or not fits(part + following[:unit])  # nothing is cut that would have fitted

"""When rounds begin, and the win rate against the previous self."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspo.selfplay import round_of, win_rate


@pytest.mark.parametrize(
    ("steps", "rounds", "expected"),
    [
        (10, 3, [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]),  # floor(k S / R): 0, 3, 6
        (9, 3, [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        (8, 5, [0, 1, 1, 2, 3, 3, 4, 4]),  # 0, 1, 3, 4, 6
        (4, 1, [0, 0, 0, 0]),
        (3, 3, [0, 1, 2]),
        (2, 5, [2, 4]),  # more rounds than steps: some have none
    ],
)
def test_rounds_by_step(steps, rounds, expected):
    assert [round_of(step, steps, rounds) for step in range(steps)] == expected


@given(st.integers(1, 60), st.integers(1, 12))
def test_round_k_starts_at_floor_of_k_s_over_r(steps, rounds):
    of = [round_of(step, steps, rounds) for step in range(steps)]
    assert of == sorted(of) and of[-1] == rounds - 1
    for k in set(of):
        assert of.index(k) == k * steps // rounds


@pytest.mark.parametrize(
    ("mine", "theirs", "margin", "wins", "ties"),
    [
        # 1.0 beats both; 0.5 beats 0.0 and ties 0.5
        ([[1.0, 0.5]], [[0.5, 0.0]], 0.1, 3.5 / 4, 1 / 4),
        # a gap of exactly the margin is a tie, one of 0.11 is none
        ([[0.8, 0.3]], [[0.7, 0.19]], 0.1, (0.5 + 1 + 0 + 1) / 4, 1 / 4),
        ([[1.0, 0.0]], [[1.0, 0.0]], 0.1, 1 / 2, 2 / 4),
        ([[0.1, 0.1]], [[0.0, 0.0]], 0.1, 1 / 2, 1.0),
        ([[0.1, 0.1]], [[0.0, 0.0]], 0.0, 1.0, 0.0),
        ([[0.0, 0.0]], [[1.0, 1.0]], 0.1, 0.0, 0.0),
        # prompts are compared with themselves only
        ([[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]], 0.1, 1 / 2, 0.0),
        # unequal numbers of answers
        ([[1.0]], [[1.0, 0.0, 0.0]], 0.1, 2.5 / 3, 1 / 3),
    ],
)
def test_win_rate_by_hand(mine, theirs, margin, wins, ties):
    assert win_rate(torch.tensor(mine), torch.tensor(theirs), margin) == pytest.approx((wins, ties))


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.5]), st.integers(1, 4), st.integers(1, 4))
def test_the_two_sides_win_rates_sum_to_one(seed, margin, n, m):
    g = torch.Generator().manual_seed(seed)
    levels = torch.tensor([0.0, 0.1, 0.5, 1.0])
    a, b = (levels[torch.randint(0, 4, (3, k), generator=g)] for k in (n, m))
    (forth, ties), (back, same) = win_rate(a, b, margin), win_rate(b, a, margin)
    assert forth + back == pytest.approx(1.0) and ties == pytest.approx(same)
    order = torch.randperm(n, generator=g)
    assert win_rate(a[:, order], b, margin) == pytest.approx((forth, ties))

"""Who beats whom: hand tables, ties, and the invariances of the relation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspo.algorithm.pairs import chosen_rejected, preferences
from gspo.reward.reward_func import compute_score, get_preference_pairs

percents = st.integers(0, 100).map(lambda k: k / 100)
groups = st.lists(percents, min_size=2, max_size=8)


def beats(rewards, margin, dtype=torch.float64):
    return preferences(torch.tensor([rewards], dtype=dtype), margin)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("high", "low", "margin", "pairs"),
    [
        (0.8, 0.7, 0.1, False),  # in floats 0.8 - 0.7 > 0.1
        (1.0, 0.9, 0.1, False),  # and 1.0 - 0.9 < 0.1
        (0.3, 0.2, 0.1, False),
        (0.1, 0.0, 0.1, False),  # the seed's levels: its > is strict
        (0.1, 0.0, 0.09, True),
        (0.5, 0.1, 0.1, True),
        (0.81, 0.7, 0.1, True),
        (1.0, 0.5, 0.5, False),
        (1.0, 0.5, 0.49, True),
        (0.51, 0.5, 0.0, True),
        (0.5, 0.5, 0.0, False),
        (1.0, 0.0, 0.99, True),
    ],
)
def test_one_pair(high, low, margin, pairs, dtype):
    assert beats([high, low], margin, dtype).tolist() == [[False, pairs], [False, False]]


def test_a_group_by_hand():
    table = preferences(torch.tensor([[1.0, 0.5, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]), 0.1)
    assert table.int().tolist() == [
        [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0]] * 4,
        [[0, 0, 0, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0]],
    ]


def test_chosen_and_rejected_come_widest_gap_first_then_in_order():
    rewards = torch.tensor([0.1, 1.0, 0.5, 1.0])
    found = chosen_rejected(preferences(rewards[None], 0.1)[0], rewards)
    assert [(i, j) for i, j, _ in found] == [(1, 0), (3, 0), (1, 2), (3, 2), (2, 0)]
    assert [gap for *_, gap in found] == pytest.approx([0.9, 0.9, 0.5, 0.5, 0.4])


@given(groups, percents.filter(lambda m: m < 1))
def test_nobody_beats_an_equal_and_never_both_ways(rewards, margin):
    d = beats(rewards, margin)
    equal = torch.tensor(rewards)[:, None] == torch.tensor(rewards)
    assert not (d & equal).any() and not (d & d.T).any()


@given(groups, percents, st.randoms(use_true_random=False))
def test_reordering_the_answers_reorders_the_table(rewards, margin, random):
    order = random.sample(range(len(rewards)), len(rewards))
    assert beats([rewards[i] for i in order], margin).equal(beats(rewards, margin)[order][:, order])


@given(groups, percents, st.floats(-100, 100))
def test_adding_a_constant_to_all_rewards_changes_nothing(rewards, margin, constant):
    assert beats([r + constant for r in rewards], margin).equal(beats(rewards, margin))


@given(groups, percents, percents)
def test_a_wider_margin_only_takes_pairs_away(rewards, margin, more):
    assert not (beats(rewards, margin + more) & ~beats(rewards, margin)).any()


ANSWERS = {1.0: "#### 7", 0.5: "3 + 4 = 8\n#### 7", 0.1: "#### 5", 0.0: "who knows"}


@given(
    st.lists(st.sampled_from(sorted(ANSWERS)), min_size=2, max_size=8),
    st.sampled_from([0.0, 0.1, 0.39, 0.4, 0.5, 0.9]),
)
def test_the_seeds_function_finds_the_same_pairs(levels, margin):
    responses = [f"{'abcdefgh'[i] * 3}.\n{ANSWERS[level]}" for i, level in enumerate(levels)]
    assert [compute_score("math", r, "7") for r in responses] == levels
    rewards = torch.tensor(levels, dtype=torch.float64)
    ours = {
        (responses[i], responses[j], round(gap, 6))
        for i, j, gap in chosen_rejected(preferences(rewards[None], margin)[0], rewards)
    }
    theirs = get_preference_pairs(responses, "7", "math", margin)
    assert {(chosen, rejected, round(gap, 6)) for chosen, rejected, gap in theirs} == ours
    assert len(theirs) == len(ours)

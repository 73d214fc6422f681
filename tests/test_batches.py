"""The order of training: a function of the seed alone, the one that published runs had."""

import numpy as np
import pytest

from gspo.data import Batches
from gspo.types import Prompt


def some(count):
    return [Prompt(i, (i,), str(i), "", "") for i in range(count)]


def order(batches, steps):
    return [[p.id for p in batches[step]] for step in steps]


@pytest.mark.parametrize(("count", "size"), [(10, 4), (8, 4), (3, 5), (5, 1)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_covers_every_prompt_once_and_its_last_batch_is_what_is_left(count, size, shuffle):
    batches = Batches(some(count), size, seed=0, shuffle=shuffle)
    for epoch in range(3):
        parts = order(batches, range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch))
        assert sorted(i for part in parts for i in part) == list(range(count))
        assert [len(part) for part in parts] == [size] * (count // size) + [count % size] * (count % size > 0)


def test_a_batch_depends_on_seed_and_step_alone():
    forwards, resumed = Batches(some(50), 8, seed=1), Batches(some(50), 8, seed=1)
    expected = order(forwards, range(20))
    assert order(resumed, [19, 3, 3, 7, 0]) == [expected[i] for i in (19, 3, 3, 7, 0)]


def test_the_order_is_the_permutation_that_published_runs_had():
    for count, size, seed in [(50, 8, 0), (2048, 64, 0), (7, 7, 3), (10, 3, 12)]:
        batches, expected = Batches(some(count), size, seed), []
        for epoch in range(2):
            order_ = np.random.default_rng([seed, epoch]).permutation(np.arange(count)).tolist()
            expected += [order_[i : i + size] for i in range(0, count, size)]
        assert order(batches, range(2 * batches.per_epoch)) == expected
    batches = Batches(some(10), 10, 0)
    assert order(batches, range(2)) == [[4, 6, 2, 7, 3, 5, 9, 0, 8, 1], [9, 1, 3, 8, 7, 6, 0, 4, 2, 5]]


def test_the_order_is_drawn_once_an_epoch(monkeypatch):
    draws = []
    rng = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: draws.append(seed) or rng(seed))
    order(Batches(some(40), 4, seed=77), range(30))
    assert draws == [[77, 0], [77, 1], [77, 2]]


def test_every_seed_and_every_epoch_has_its_own_order():
    orders = [tuple(order(Batches(some(50), 50, seed), [epoch])[0]) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25


def test_without_shuffling_the_order_is_the_files():
    assert order(Batches(some(5), 2, seed=3, shuffle=False), range(4)) == [[0, 1], [2, 3], [4], [0, 1]]

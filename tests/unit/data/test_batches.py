"""The order of training: which prompts, when; a function of the seed and of what was solved."""

import numpy as np
import pytest

from gspo.data.batches import LONGEST_STREAK, Batches
from gspo.errors import UserError
from gspo.types import Prompt


def some(count):
    return [Prompt(i, (i,), str(i), "", "") for i in range(count)]


def order(batches, steps, solved=lambda i: False):
    """The ids of the next `steps` batches, when the prompts with `solved(id)` get right answers only."""
    found = []
    for _ in range(steps):
        found.append([p.id for p in batches.take()])
        batches.mark_solved([solved(i) for i in found[-1]])
    return found


@pytest.mark.parametrize(("count", "size"), [(10, 4), (8, 4), (3, 5), (5, 1), (9, 8)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_are_full_and_hold_no_prompt_twice(count, size, shuffle):
    parts = order(Batches(some(count), size, seed=0, shuffle=shuffle), 40)
    assert all(len(part) == len(set(part)) == min(size, count) for part in parts)
    times = np.bincount([i for part in parts for i in part])
    assert times.min() >= 0.85 * times.mean(), "where one epoch ends in another's batch, a turn may be missed"


def test_an_epoch_that_batches_divide_covers_every_prompt_once():
    batches = Batches(some(24), 6, seed=3)
    for _ in range(3):
        assert sorted(i for part in order(batches, batches.per_epoch) for i in part) == list(range(24))


def test_the_order_is_the_permutation_that_published_runs_had():
    for count, size, seed in [(48, 8, 0), (2048, 64, 0), (7, 7, 3), (8192, 64, 12)]:
        batches, expected = Batches(some(count), size, seed), []
        for epoch in range(2):
            drawn = np.random.default_rng([seed, epoch]).permutation(np.arange(count)).tolist()
            expected += [drawn[i : i + size] for i in range(0, count, size)]
        assert order(batches, 2 * batches.per_epoch) == expected
    assert order(Batches(some(10), 10, 0), 2) == [[4, 6, 2, 7, 3, 5, 9, 0, 8, 1], [9, 1, 3, 8, 7, 6, 0, 4, 2, 5]]


def test_the_order_is_drawn_once_per_epoch(monkeypatch):
    draws = []
    rng = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: draws.append(seed) or rng(seed))
    order(Batches(some(40), 4, seed=77), 30)
    assert draws == [[77, 0], [77, 1], [77, 2]]


def test_every_seed_and_every_epoch_has_its_own_order():
    orders = [tuple(part) for seed in range(5) for part in order(Batches(some(50), 50, seed), 5)]
    assert len(set(orders)) == 25


def test_without_shuffling_the_order_is_the_files():
    assert order(Batches(some(5), 2, seed=3, shuffle=False), 5) == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]


def test_a_solved_prompt_is_skipped_for_1_3_7_epochs():
    batches = Batches(some(8), 1, seed=0)
    came = {i: [] for i in range(8)}
    while batches.epoch < 80:
        (prompt,) = batches.take()
        came[prompt.id].append(batches.epoch)
        batches.mark_solved([prompt.id == 0 or (prompt.id == 1 and len(came[1]) != 3)])
    assert came[0] == [0, 2, 6, 14, 30, 62], "1, 3, 7, 15 and 31 epochs between"
    assert came[1][:6] == [0, 2, 6, 7, 9, 13], "one wrong answer and it begins anew"
    assert all(came[i][:80] == list(range(80)) for i in range(2, 8)), "the others come by every epoch"


def test_a_prompt_is_skipped_for_at_most_63_epochs():
    batches = Batches(some(2), 1, seed=0)
    came = []
    while len(came) < 9:
        (prompt,) = batches.take()
        came += [batches.epoch] * (prompt.id == 0)
        batches.mark_solved([prompt.id == 0])
    assert np.diff(came)[-2:].tolist() == [2**LONGEST_STREAK] * 2


def test_when_all_are_solved_those_that_wait_least_come_first_and_batches_stay_full():
    batches = Batches(some(6), 4, seed=0)
    parts = order(batches, 30, solved=lambda i: True)
    assert all(len(set(part)) == 4 for part in parts)
    times = np.bincount([i for part in parts for i in part], minlength=6)
    assert times.min() >= 15 and times.sum() == 120


def test_without_spacing_solved_prompts_are_not_skipped():
    plain, solved = (Batches(some(20), 6, seed=1, spaced=False) for _ in range(2))
    assert order(plain, 20) == order(solved, 20, solved=lambda i: i % 2 == 0)


def test_a_resumed_order_goes_on_as_if_nothing_had_happened():
    solved = lambda i: i % 3 == 0  # noqa: E731
    whole = order(Batches(some(50), 8, seed=1), 40, solved)
    first = Batches(some(50), 8, seed=1)
    assert order(first, 17, solved) == whole[:17]
    second = Batches(some(50), 8, seed=1)
    second.load_state(first.state())
    assert order(first, 3, solved) == whole[17:20]
    assert order(second, 23, solved) == whole[17:], "a state is a copy"


def test_the_state_of_other_rows_is_refused():
    saved = Batches(some(8), 4, seed=0).state()
    for count in (7, 9):
        with pytest.raises(UserError, match=rf"data.train_files: they have {count} rows.*8.*model.path=CHECKPOINT"):
            Batches(some(count), 4, seed=0).load_state(saved)

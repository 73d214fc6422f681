"""The order of training: which prompts, when; a function of the seed and of what had contrast. And the rewards over all
prompts, those that are put off included."""

import math

import numpy as np
import pytest
import torch

from gspo.data.batches import LONGEST_STREAK, Batches
from gspo.errors import UserError
from gspo.types import Prompt


def some(count):
    return [Prompt(i, (i,), str(i), "", "") for i in range(count)]


def order(batches, steps, alike=lambda i: False):
    """The ids of the next `steps` batches, when the responses to the prompts with `alike(id)` are rewarded alike."""
    found = []
    for _ in range(steps):
        found.append([p.id for p in batches.take()])
        batches.record([not alike(i) for i in found[-1]], [0.5] * len(found[-1]), [1.0] * len(found[-1]))
    return found


@pytest.mark.parametrize(("count", "size"), [(10, 4), (8, 4), (3, 5), (5, 1), (9, 8)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_are_full_and_hold_no_prompt_twice(count, size, shuffle):
    parts = order(Batches(some(count), size, seed=0, shuffle=shuffle, spaced=True), 40)
    assert all(len(part) == len(set(part)) == min(size, count) for part in parts)
    times = np.bincount([i for part in parts for i in part])
    assert times.min() >= 0.85 * times.mean(), "where one epoch ends in another's batch, a turn may be missed"


def test_an_epoch_that_batches_divide_covers_every_prompt_once():
    batches = Batches(some(24), 6, seed=3, spaced=True)
    for _ in range(3):
        assert sorted(i for part in order(batches, batches.per_epoch) for i in part) == list(range(24))


def test_the_order_is_the_permutation_that_published_runs_had():
    for count, size, seed in [(48, 8, 0), (2048, 64, 0), (7, 7, 3), (8192, 64, 12)]:
        batches, expected = Batches(some(count), size, seed, spaced=True), []
        for epoch in range(2):
            drawn = np.random.default_rng([seed, epoch]).permutation(np.arange(count)).tolist()
            expected += [drawn[i : i + size] for i in range(0, count, size)]
        assert order(batches, 2 * batches.per_epoch) == expected
    assert order(Batches(some(10), 10, 0, spaced=True), 2) == [
        [4, 6, 2, 7, 3, 5, 9, 0, 8, 1],
        [9, 1, 3, 8, 7, 6, 0, 4, 2, 5],
    ]


def test_the_order_is_drawn_once_per_epoch(monkeypatch):
    draws = []
    rng = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: draws.append(seed) or rng(seed))
    order(Batches(some(40), 4, seed=77, spaced=True), 30)
    assert draws == [[77, 0], [77, 1], [77, 2]]


def test_every_seed_and_every_epoch_has_its_own_order():
    orders = [tuple(part) for seed in range(5) for part in order(Batches(some(50), 50, seed, spaced=True), 5)]
    assert len(set(orders)) == 25


def test_without_shuffling_the_order_is_the_files():
    assert order(Batches(some(5), 2, seed=3, shuffle=False, spaced=True), 5) == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]


def visits(batches, epochs, alike=lambda i, times: False):
    """{id: the epochs that took it}, when responses to it are rewarded alike at the visits with `alike(id, number)`."""
    came = {p.id: [] for p in batches.prompts}
    while batches.epoch < epochs:
        ids = [p.id for p in batches.take()]
        for i, epoch in batches.current.T.tolist():
            came[i].append(epoch)
        batches.record([not alike(i, len(came[i])) for i in ids], [0.0] * len(ids), [0.0] * len(ids))
    return came


def test_a_prompt_without_contrast_is_put_off_for_1_then_3_then_7_epochs():
    came = visits(Batches(some(8), 1, seed=0, spaced=True), 40, lambda i, n: i == 0 or (i == 1 and n != 3))
    assert came[0] == [0, 2, 6, 14, 22, 30, 38], "never longer than 7"
    assert came[1][:6] == [0, 2, 6, 7, 9, 13], "one group with contrast and it begins anew"
    assert all(came[i][:40] == list(range(40)) for i in range(2, 8)), "the others come by every epoch"


def test_a_prompt_whose_rewards_are_unknown_is_not_put_off():
    batches = Batches(some(4), 4, seed=0, spaced=True)
    for _ in range(3):
        assert {p.id for p in batches.take()} == {0, 1, 2, 3}
        batches.record(*[[math.nan] * 4] * 3)
    assert batches.epoch == 2 and not batches.streak.any()


@pytest.mark.parametrize(("count", "size"), [(6, 4), (40, 7), (40, 40), (50, 3), (3, 5)])
@pytest.mark.parametrize("kind", ["all alike", "two thirds alike", "by chance"])
def test_nothing_starves_epochs_are_counted_one_by_one_and_batches_stay_full(count, size, kind):
    draw = np.random.default_rng(0)
    alike = {
        "all alike": lambda i: True,
        "two thirds alike": lambda i: i % 3 > 0,
        "by chance": lambda i: draw.random() < 0.8,
    }
    batches, last, epochs = Batches(some(count), size, seed=0, spaced=True), np.zeros(count), [0]
    for _ in range(30 * batches.per_epoch):
        (ids,) = order(batches, 1, alike[kind])
        assert len(ids) == len(set(ids)) == min(size, count)
        assert (batches.current[1] - last[ids]).max() <= 2**LONGEST_STREAK + 1, (
            "a turn may be missed between two epochs"
        )
        last[ids] = batches.current[1]
        epochs.append(batches.epoch)
    assert (batches.epoch - last).max() <= 2**LONGEST_STREAK + 1, "of those that did not come, too"
    assert set(np.diff(epochs)) <= {0, 1} and batches.epoch >= 25, "no epoch is left out"


def test_when_all_are_put_off_those_due_soonest_come_earlier():
    batches = Batches(some(6), 2, seed=0, spaced=True)
    for epoch in range(3):
        assert {i for part in order(batches, 3, alike=lambda i: True) for i in part} == {*range(6)}
        assert batches.epoch == epoch, "all wait equally long, so the next epoch has them all"
    batches = Batches(some(6), 2, seed=0, spaced=True)
    batches.due[:], batches.streak[:], batches.epoch = [9, 9, 5, 4, 7, 6], 2, 3
    batches.position = 6
    assert sorted(p.id for p in batches.take()) == [2, 3], "due in epochs 4 and 5"
    assert batches.epoch == 4


def test_without_spacing_nothing_is_put_off():
    plain, alike = (Batches(some(20), 6, seed=1, spaced=False) for _ in range(2))
    assert order(plain, 20) == order(alike, 20, alike=lambda i: i % 2 == 0)
    batches = Batches(some(4), 2, seed=1, spaced=False)
    for mean in (0.25, 0.5, 0.75):
        batches.take()
        curves = batches.record([0, 0], [mean, mean], [1.0, 0.0])
        assert (curves["reward_mean"], curves["reward_max"], curves["data/put_off"]) == (mean, 0.5, 0.0)


# ---- rewards over all prompts ----


def test_the_mean_over_all_prompts_by_hand():
    """Of ten prompts, the four that were all right and the one all wrong in epoch 0 are put off in epoch 1."""
    batches = Batches(some(10), 5, seed=4, spaced=True)
    for _ in range(2):
        ids = [p.id for p in batches.take()]
        mean = [1.0 if i < 4 else 0.0 if i == 4 else 0.5 for i in ids]
        curves = batches.record([i > 4 for i in ids], mean, [float(i != 4) for i in ids])
        assert curves["data/put_off"] == curves["data/epoch"] == 0.0
        assert curves["reward_mean"] == pytest.approx(np.mean(mean)), "nothing is put off: the batch's mean"
    ids = sorted(p.id for p in batches.take())
    assert ids == [5, 6, 7, 8, 9]
    curves = batches.record([1] * 5, [0.7, 0.7, 0.8, 0.9, 0.9], [1.0, 1.0, 1.0, 1.0, 0.0])
    assert curves["data/put_off"] == 0.5 and curves["data/epoch"] == 1.0
    assert curves["reward_mean"] == pytest.approx(0.5 * (4 * 1.0 + 0.0) / 5 + 0.5 * 0.8)
    assert curves["reward_max"] == pytest.approx(0.5 * (4 * 1.0 + 0.0) / 5 + 0.5 * 0.8)


def test_what_is_unknown_is_left_out_of_the_mean():
    batches = Batches(some(4), 2, seed=0, spaced=True)
    batches.take()
    assert batches.record([math.nan, 1], [math.nan, 0.5], [math.nan, 1.0])["reward_mean"] == 0.5
    batches.take()
    assert batches.record(*[[math.nan] * 2] * 3).keys() == {"data/put_off", "data/epoch"}


class Learner:
    """A policy that answers prompt i rightly with probability p_i, which rises with every group that has contrast; the
    gold answers of some prompts are wrong, so that nothing scores there."""

    def __init__(self, count, wrong, skill=0.0, rate=0.12):
        self.draw, self.skill, self.rate = np.random.default_rng(0), skill, rate
        self.ease = self.draw.normal(-0.4, 1.2, count)
        self.wrong = self.draw.random(count) < wrong

    def chances(self):
        return np.where(self.wrong, 0.0, 1 / (1 + np.exp(-self.ease - self.skill)))

    def train(self, batches, steps, n=4):
        """The curves of some steps, and beside them the truth: the mean chance over all prompts."""
        curves = []
        for _ in range(steps):
            truth, ids = self.chances(), [p.id for p in batches.take()]
            right = self.draw.random((len(ids), n)) < truth[ids, None]
            contrast = right.any(1) & ~right.all(1)
            found = batches.record(contrast, right.mean(1), right.max(1).astype(float))
            curves.append(found | {"truth": truth.mean(), "contrast": contrast.mean(), "wrong": self.wrong[ids].mean()})
            self.skill += self.rate * contrast.mean()
        return {name: np.array([c[name] for c in curves]) for name in curves[0]}


@pytest.mark.parametrize("wrong", [0.0, 0.15, 0.5])
def test_rewards_rise_with_the_policy_whatever_the_share_of_wrong_gold_answers(wrong):
    seen = Learner(512, wrong).train(Batches(some(512), 32, seed=0, spaced=True), 160)
    quarters = seen["reward_mean"].reshape(8, 20).mean(1)
    assert (np.diff(quarters) > -0.01).all() and quarters[-1] > quarters[0] + 0.15
    assert np.abs(quarters - seen["truth"].reshape(8, 20).mean(1)).max() < 0.035, "the estimate is near the truth"
    assert seen["wrong"][80:].mean() < wrong + 0.02, "what is out of reach takes no more than its part of the batches"
    assert seen["data/put_off"][80:].mean() > 0.5


def test_spacing_finds_more_groups_with_contrast():
    """Of a policy that does not change, so that both have the same chances."""
    found = {}
    for spaced in (False, True):
        learner = Learner(512, 0.15, skill=2.0, rate=0.0)
        found[spaced] = learner.train(Batches(some(512), 32, seed=0, spaced=spaced), 160)["contrast"][40:].mean()
    assert found[True] > 1.3 * found[False], found


# ---- checkpoints ----


def test_a_resumed_order_goes_on_as_if_nothing_had_happened():
    alike = lambda i: i % 3 == 0  # noqa: E731
    whole = order(Batches(some(50), 8, seed=1, spaced=True), 40, alike)
    first = Batches(some(50), 8, seed=1, spaced=True)
    assert order(first, 17, alike) == whole[:17]
    second = Batches(some(50), 8, seed=1, spaced=True)
    second.load_state(first.state())
    assert order(first, 3, alike) == whole[17:20]
    assert order(second, 23, alike) == whole[17:], "a state is a copy"


def test_a_resumed_run_has_the_same_curves():
    learner, whole = Learner(60, 0.15), Batches(some(60), 8, seed=1, spaced=True)
    learner.train(whole, 30)
    resumed = Batches(some(60), 8, seed=1, spaced=True)
    resumed.load_state(whole.state())
    assert len(whole._skipped())
    for _ in range(30):
        ids = [p.id for p in whole.take()]
        assert ids == [p.id for p in resumed.take()]
        outcome = [[i % 2 for i in ids], [i / 60 for i in ids], [i / 59 for i in ids]]
        assert whole.record(*outcome) == resumed.record(*outcome)


def test_a_checkpoint_of_an_earlier_version_resumes_and_says_what_it_lacks(capsys):
    """Without rewards, and with pauses of up to 63 epochs."""
    batches = Batches(some(8), 2, seed=0, spaced=True)
    due, streak = [70, 12, 11, 11, 11, 11, 12, 11], [6, 1, 0, 0, 0, 0, 1, 0]
    batches.load_state({"at": torch.tensor([10, 8]), "due": torch.tensor(due, dtype=torch.int32),
                        "streak": torch.tensor(streak, dtype=torch.int8)})  # fmt: skip
    (said,) = capsys.readouterr().out.splitlines()
    assert "earlier version" in said and "1 prompts" in said and "reward_mean" in said
    batches.take()
    curves = batches.record([1, 1], [0.25, 0.75], [1.0, 1.0])
    assert curves["reward_mean"] == 0.5 and curves["data/put_off"] == 3 / 8
    last = visits(batches, 30)
    assert last[0][0] <= 10 + 2**LONGEST_STREAK
    batches.load_state(batches.state())
    assert capsys.readouterr().out == ""


def test_the_state_of_other_rows_is_refused():
    saved = Batches(some(8), 4, seed=0, spaced=True).state()
    for count in (7, 9):
        with pytest.raises(UserError, match=rf"data.train_files: they have {count} rows.*8.*model.path=CHECKPOINT"):
            Batches(some(count), 4, seed=0, spaced=True).load_state(saved)

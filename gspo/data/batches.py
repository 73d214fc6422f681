"""Choose the prompts of each batch: epochs in a random order, in which prompts that teach nothing come less often."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gspo.errors import UserError
from gspo.system.console import say
from gspo.types import Prompt

WINDOW = 4096  # prompts of the order examined at once
LONGEST_STREAK = 3  # without contrast this often in a row or more, a prompt is put off for 2^3 - 1 epochs: the longest


@functools.lru_cache(maxsize=1)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch, [count]."""
    order = np.random.default_rng([seed, epoch]).permutation(np.arange(count))
    order.flags.writeable = False
    return order


class Batches:
    """Hand out batches of `size` different prompts, epoch after epoch, each in an order that the seed decides.

    An epoch is a pass over the prompts. With `spaced` it skips those that are put off: a prompt whose group had no
    contrast, that is, whose responses were rewarded alike, whether right or wrong, is put off for 1 epoch, then for 3,
    then for 7 each time, until a group of it has contrast. No objective learns from a group of equal rewards, so the
    samples go where there is something to learn; and because no pause is longer, what is out of reach today is tried
    again.

    A batch that starts at the end of an epoch is filled from the next one. Where an epoch would have fewer prompts than
    a batch, those that are due soonest come earlier.
    """

    def __init__(self, prompts: Sequence[Prompt], size: int, seed: int, shuffle: bool = True, spaced: bool = False):
        self.prompts, self.size, self.seed, self.shuffle, self.spaced = prompts, size, seed, shuffle, spaced
        self.epoch, self.position = 0, 0  # the next prompt: which epoch, and where in its order
        self.due = np.zeros(len(prompts), np.int32)  # [P] the first epoch in which a prompt may come again
        self.streak = np.zeros(len(prompts), np.int8)  # [P] groups without contrast in a row
        # [P] mean and best reward of a prompt's last group, NaN where unknown; read only where it is put off
        self.mean, self.best = np.zeros(len(prompts), np.float32), np.zeros(len(prompts), np.float32)
        self.current = np.zeros((2, 0), np.int32)  # the batch taken last: its prompts, and the epoch of each

    @property
    def per_epoch(self) -> int:
        """Return the number of batches in a pass over all prompts, none of them put off."""
        return -(-len(self.prompts) // self.size)

    def take(self) -> list[Prompt]:
        """Return the next batch."""
        batch: list[int] = []
        epochs: list[int] = []
        size, count = min(self.size, len(self.prompts)), len(self.prompts)
        while len(batch) < size:
            order = _order(count, self.seed, self.epoch) if self.shuffle else np.arange(count)
            window = order[self.position : self.position + WINDOW]
            free = (self.due[window] <= self.epoch) & ~np.isin(window, batch)
            chosen = np.flatnonzero(free)[: size - len(batch)]
            batch += window[chosen].tolist()
            epochs += [self.epoch] * len(chosen)
            self.position += int(chosen[-1]) + 1 if len(batch) == size else len(window)
            if len(batch) < size and self.position == count:
                self._begin_epoch(batch)
        self.current = np.array([batch, epochs], np.int32)
        return [self.prompts[i] for i in batch]

    def _begin_epoch(self, batch: list[int]) -> None:
        """Begin the next epoch, with enough prompts for a batch beside those in `batch`, which it does not take again.

        Prompts that are put off by the same number of epochs come earlier together.
        """
        self.epoch, self.position = self.epoch + 1, 0
        others = np.delete(self.due, batch)
        enough = min(self.size, len(others)) - 1
        latest = int(np.partition(others, enough)[enough])
        if latest > self.epoch:
            self.due[self.due <= latest] = self.epoch

    def record(self, contrast: Sequence[float], mean: Sequence[float], best: Sequence[float]) -> dict[str, float]:
        """Record what came of the batch taken last; return the curves that are about all prompts (metrics GLOSSARY).

        For each prompt of the batch: whether its group has contrast (1 or 0), its mean and its best reward. All three
        are NaN where the rewards are unknown; such a prompt is not put off.
        """
        skipped = self._skipped()
        share = len(skipped) / len(self.prompts)
        curves = {"data/epoch": float(self.epoch), "data/put_off": share}
        for name, now, last in (("reward_mean", mean, self.mean), ("reward_max", best, self.best)):
            value = _over_all(np.asarray(now), last[skipped], share)
            curves |= {} if value is None else {name: value}
        if self.spaced:
            prompts, epochs = self.current
            longer = np.minimum(self.streak[prompts] + 1, LONGEST_STREAK)
            streak = np.where(np.asarray(contrast) == 0, longer, 0)
            self.streak[prompts], self.due[prompts] = streak, epochs + 2**streak
            self.mean[prompts], self.best[prompts] = mean, best
        return curves

    def _skipped(self) -> np.ndarray:
        """Return the prompts that this epoch skips: due later, and last taken, without contrast, before it."""
        waiting = np.flatnonzero(self.streak)
        due = self.due[waiting]
        taken = due - 2 ** self.streak[waiting].astype(np.int32)
        return waiting[(taken < self.epoch) & (self.epoch < due)]

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs to go on in the same order."""
        at = np.array([self.epoch, self.position], np.int64)
        arrays = {"at": at, "due": self.due, "streak": self.streak, "mean": self.mean, "best": self.best}
        return {name: torch.from_numpy(x.copy()) for name, x in arrays.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state. Raise UserError where it is of another number of prompts."""
        if len(state["due"]) != len(self.prompts):
            raise UserError(
                f"data.train_files: they have {len(self.prompts)} rows, but the checkpoint is of a run with "
                f"{len(state['due'])}. Give the files of that run; to train its weights on other rows, start a new run "
                "with model.path=CHECKPOINT."
            )
        self.epoch, self.position = state["at"].tolist()
        self.due, self.streak = state["due"].numpy().copy(), state["streak"].numpy().copy()
        if "mean" in state:
            self.mean, self.best = state["mean"].numpy().copy(), state["best"].numpy().copy()
        else:
            self._complete_old_state()

    def _complete_old_state(self) -> None:
        """Fit a state without rewards, in which pauses may be longer, to this version."""
        self.mean[:], self.best[:] = np.nan, np.nan
        longer = self.streak > LONGEST_STREAK
        self.streak[longer] = LONGEST_STREAK
        self.due[longer] = np.minimum(self.due[longer], self.epoch + 2**LONGEST_STREAK - 1)
        count = len(self._skipped())
        if count:
            say(
                f"the checkpoint, of an earlier version, has no rewards of the {count} prompts that are put off now: "
                "reward_mean and reward_max leave them out until they come again."
            )


def _over_all(now: np.ndarray, last: np.ndarray, put_off: float) -> float | None:
    """Estimate a mean over all prompts by strata; None where no reward is known (NaN).

    The batch, with the rewards `now`, is a random part of the prompts that the epoch does not skip, and speaks for all
    of them. The share that is put off enters with the rewards of each prompt's `last` group.
    """
    strata = [(1 - put_off, now[~np.isnan(now)]), (put_off, last[~np.isnan(last)])]
    parts = [(weight, float(x.mean(dtype=np.float64))) for weight, x in strata if weight and len(x)]
    total = sum(weight for weight, _ in parts)
    return sum(weight * x for weight, x in parts) / total if parts else None

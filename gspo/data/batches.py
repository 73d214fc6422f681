"""Which prompts are trained, and when: epochs in a drawn order, in which solved prompts come by less and less often."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gspo.errors import UserError
from gspo.types import Prompt

WINDOW = 4096  # prompts looked at together
LONGEST_STREAK = 6  # a prompt that was solved so often in a row is put off for 2^6 - 1 epochs, and no longer


@functools.lru_cache(maxsize=1)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(np.arange(count))
    order.flags.writeable = False
    return order


class Batches:
    """Batches of `size` different prompts, epoch after epoch, each in an order that the seed decides.

    With `spaced`, a prompt whose answers were all right is put off for 1, 3, 7, ... epochs (spaced repetition): no
    objective learns from a group of equals, and the samples go where the policy still errs. A batch is filled from the
    next epoch where one ends.
    """

    def __init__(self, prompts: Sequence[Prompt], size: int, seed: int, shuffle: bool = True, spaced: bool = True):
        self.prompts, self.size, self.seed, self.shuffle, self.spaced = prompts, size, seed, shuffle, spaced
        self.epoch, self.place = 0, 0
        self.due = np.zeros(len(prompts), np.int32)  # the epoch from which on a prompt may come by again
        self.streak = np.zeros(len(prompts), np.int8)  # times in a row that it was solved
        self.taken = np.zeros((2, 0), np.int32)  # the batch at work: prompts, and the epoch of each

    @property
    def per_epoch(self) -> int:
        """Batches in a pass over all prompts."""
        return -(-len(self.prompts) // self.size)

    def take(self) -> list[Prompt]:
        """The next batch."""
        batch: list[int] = []
        epochs: list[int] = []
        size, count = min(self.size, len(self.prompts)), len(self.prompts)
        while len(batch) < size:
            order = _order(count, self.seed, self.epoch) if self.shuffle else np.arange(count)
            window = order[self.place : self.place + WINDOW]
            free = (self.due[window] <= self.epoch) & ~np.isin(window, batch)
            chosen = np.flatnonzero(free)[: size - len(batch)]
            batch += window[chosen].tolist()
            epochs += [self.epoch] * len(chosen)
            self.place += int(chosen[-1]) + 1 if len(batch) == size else len(window)
            if len(batch) < size and self.place == count:
                # The epoch is over. Those of this batch that lead the next one have had their turn in it.
                self.epoch, self.place = max(self.epoch + 1, int(np.delete(self.due, batch).min())), 0
        self.taken = np.array([batch, epochs], np.int32)
        return [self.prompts[i] for i in batch]

    def learn(self, solved: Sequence[bool]) -> None:
        """Tell which prompts of the batch had right answers only."""
        if not self.spaced:
            return
        prompts, epochs = self.taken
        streak = np.where(solved, np.minimum(self.streak[prompts] + 1, LONGEST_STREAK), 0)
        self.streak[prompts], self.due[prompts] = streak, epochs + 2**streak

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on in the same order."""
        at = np.array([self.epoch, self.place], np.int64)
        return {
            name: torch.from_numpy(x.copy()) for name, x in (("at", at), ("due", self.due), ("streak", self.streak))
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """UserError where the state is of another number of prompts."""
        if len(state["due"]) != len(self.prompts):
            raise UserError(
                f"data.train_files: there are {len(self.prompts)} rows, and the checkpoint is of a run with "
                f"{len(state['due'])}. Give the rows it had; to go on from its weights with others, start a run with "
                "model.path=CHECKPOINT."
            )
        self.epoch, self.place = state["at"].tolist()
        self.due, self.streak = state["due"].numpy().copy(), state["streak"].numpy().copy()

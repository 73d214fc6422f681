"""Choose the prompts of each batch: epochs in a random order, with solved prompts repeated less and less often."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gspo.errors import UserError
from gspo.types import Prompt

WINDOW = 4096  # prompts of the order examined at once
LONGEST_STREAK = 6  # solved this often in a row or more, a prompt is skipped for 2^6 - 1 epochs


@functools.lru_cache(maxsize=1)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch, [count]."""
    order = np.random.default_rng([seed, epoch]).permutation(np.arange(count))
    order.flags.writeable = False
    return order


class Batches:
    """Hand out batches of `size` different prompts, epoch after epoch, each in an order that the seed decides.

    With `spaced`, a prompt whose responses were all right is skipped for 1, 3, 7, ... epochs (spaced repetition): no
    objective learns from a group of equal rewards, and the samples go where the policy still errs. A batch that starts
    at the end of an epoch is filled from the next one.
    """

    def __init__(self, prompts: Sequence[Prompt], size: int, seed: int, shuffle: bool = True, spaced: bool = True):
        self.prompts, self.size, self.seed, self.shuffle, self.spaced = prompts, size, seed, shuffle, spaced
        self.epoch, self.position = 0, 0  # the next prompt: which epoch, and where in its order
        self.due = np.zeros(len(prompts), np.int32)  # [P] the first epoch in which a prompt may come again
        self.streak = np.zeros(len(prompts), np.int8)  # [P] how often in a row it was solved
        self.current = np.zeros((2, 0), np.int32)  # the batch taken last: its prompts, and the epoch of each

    @property
    def per_epoch(self) -> int:
        """Return the number of batches in a pass over all prompts."""
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
                # The epoch is over. Prompts that are in this batch already are not taken again from the next one.
                self.epoch, self.position = max(self.epoch + 1, int(np.delete(self.due, batch).min())), 0
        self.current = np.array([batch, epochs], np.int32)
        return [self.prompts[i] for i in batch]

    def mark_solved(self, solved: Sequence[bool]) -> None:
        """Record for each prompt of the batch taken last whether all its responses were right."""
        if not self.spaced:
            return
        prompts, epochs = self.current
        streak = np.where(solved, np.minimum(self.streak[prompts] + 1, LONGEST_STREAK), 0)
        self.streak[prompts], self.due[prompts] = streak, epochs + 2**streak

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs to go on in the same order."""
        at = np.array([self.epoch, self.position], np.int64)
        return {
            name: torch.from_numpy(x.copy()) for name, x in (("at", at), ("due", self.due), ("streak", self.streak))
        }

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

"""The slots' tables on the device, at addresses that stay: steps follow each other, or are replayed, without the host.

Before a block of steps the host writes who sits in which slot, and gives every slot the pages of all the tokens it may
draw; after it the host reads who has ended. In between the device counts. A slot that has ended, or where nobody sits,
stands still: it repeats its step, and what it draws goes to a row of the results that nobody reads.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gspo.kernels.pages import Pool, Readers
from gspo.rollout.pages import pages_for
from gspo.rollout.slots import Slots

TOGETHER = 16  # slots at most that read a prompt's pages in one program; further ones read them again
LEAST = 8  # slots of the smallest step


class Tables:
    """Room for `most` slots, of prompts and answers of at most so many tokens, at most `n` answers to a prompt."""

    def __init__(self, slots: Slots, most: int, n: int, longest_prompt: int, longest_answer: int):
        def room(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=slots.device)

        self.slots, self.most = slots, most
        self.state = room(3, most, dtype=torch.int64)
        self.rows, self.lengths, self.sizes = self.state  # of the results; tokens kept after the step; of the prompt
        self.answer_pages = room(most, pages_for(max(1, longest_answer - 1), slots.answers.page))
        self.prompt_pages = room(most, pages_for(longest_prompt, slots.prompts.page))
        self.members = room(most, min(n, TOGETHER))
        self.prompt_sizes, self.prompt_starts = room(most), room(most)
        self.alone = torch.arange(most, dtype=torch.int32, device=slots.device)[:, None].contiguous()

    def count(self) -> int:
        """Slots of a step: `most` or a half, a quarter, ... of it, as many as there are answers at least."""
        count = self.most
        while count // 2 >= max(len(self.slots), LEAST):
            count //= 2
        return count

    def load(self, count: int, upto: np.ndarray, spare_row: int) -> None:
        """Write the tables of `count` slots, with pages for the first `upto` [S] tokens of each of the S answers; the
        slots behind them stand still on a page that nobody has, in the row `spare_row` of the results."""
        slots, empty = self.slots, count - len(self.slots)
        slots.reserve(upto)
        numbers, which = np.unique(slots.prompt, return_inverse=True)
        sizes = np.array([slots.sizes[number] for number in numbers.tolist()] + [0])
        which = np.concatenate([which, np.full(empty, len(numbers))])
        state = np.zeros((3, count), dtype=np.int64)
        state[0] = np.concatenate([slots.rows, np.full(empty, spare_row)])
        state[1] = np.concatenate([slots.length + 1, np.ones(empty, dtype=np.int64)])
        state[2] = sizes[which]
        own = np.full((count, self.answer_pages.shape[1]), slots.answers.spare if empty else 0)
        _fill(own, slots.answers.owner, slots.answers.start // slots.answers.page)

        known = np.searchsorted(numbers, slots.prompts.owner).clip(max=len(numbers) - 1)
        owner = np.where(numbers[known] == slots.prompts.owner, known, -1)
        pages = np.zeros((len(numbers) + 1, self.prompt_pages.shape[1]), dtype=np.int64)
        _fill(pages, owner, slots.prompts.start // slots.prompts.page)
        prompt, members = _together(which, self.members.shape[1], count)
        for table, values in (
            (self.state[:, :count], state),
            (self.answer_pages[:count], own),
            (self.prompt_pages[:count], pages[prompt]),
            (self.prompt_sizes[:count], sizes[prompt]),
            (self.members[:count], members),
        ):
            table.copy_(torch.from_numpy(values))

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Copy to the host, once a block: each slot's row of the results [S], the spare row where its response has
        ended, and its response's length [S]."""
        rows, lengths = self.state[:2, : len(self.slots)].cpu().numpy()
        return rows, lengths - 1


def _fill(table: np.ndarray, owner: np.ndarray, place: np.ndarray) -> None:
    """Enter page i as number place[i] of owner[i]; -1: nobody's."""
    used = np.flatnonzero(owner >= 0)
    table[owner[used], place[used]] = used


def _together(which: np.ndarray, most: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """which [S], the prompt of each slot -> the prompt [count] and the slots [count, most], -1: none, of each sequence
    that is read together. Sequences behind the last one have no slots, and the last prompt."""
    order, counts = which.argsort(kind="stable"), np.bincount(which)
    nth = np.empty_like(which)
    nth[order] = np.arange(len(which)) - (counts.cumsum() - counts)[which[order]]
    sequences = -(-counts // most)
    place = (sequences.cumsum() - sequences)[which] + nth // most
    members = np.full((count, most), -1)
    members[place, nth % most] = np.arange(len(which))
    prompt = np.full(count, len(counts) - 1)
    prompt[place] = which
    return prompt, members


class FixedStep:
    """One new token for each of the first S slots of the tables. What it computes of them stays on the device."""

    def __init__(self, tables: Tables, count: int):
        self._tables, self._count = tables, count
        self.rows, self.lengths, self._sizes = tables.state[:, :count]
        self.positions = (self._sizes + self.lengths - 1)[:, None]  # [S, 1]
        self._places: dict[int, Tensor] = {}

    @cached_property
    def flat_positions(self) -> Tensor:
        return self.positions[:, 0].int()

    @cached_property
    def _readers(self) -> tuple[Readers, Readers]:
        t, first = self._tables, slice(self._count)
        prompts = Readers(t.prompt_pages[first], t.members[first], t.prompt_sizes[first], t.prompt_starts[first])
        return prompts, Readers(t.answer_pages[first], t.alone[first], self.lengths.int(), self._sizes.int())

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put the new keys and values [S, Hk, D] on their pages."""
        pool, heads = self._tables.slots.answers, keys.shape[1]
        if heads not in self._places:
            last = self.lengths - 1
            page = self._tables.answer_pages[: self._count].gather(1, (last // pool.page)[:, None])[:, 0]
            self._places[heads] = pool.places(page.long(), last % pool.page, heads)
        pool.write(layer, self._places[heads], keys.flatten(0, 1), values.flatten(0, 1))

    def pools(self, layer: int) -> tuple[Pool, Pool]:
        """Of prompts and of answers."""
        slots = self._tables.slots
        kept = ((pool.keys[layer], pool.values[layer]) for pool in (slots.prompts, slots.answers))
        return tuple(Pool(*x, readers) for x, readers in zip(kept, self._readers, strict=True))

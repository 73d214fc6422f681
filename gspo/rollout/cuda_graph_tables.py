"""Slot tables at fixed GPU addresses, so that a decoding step can be captured in a CUDA graph.

Before a block of steps the host writes which response each slot grows, with the pages of all tokens it may draw; after
the block it reads which responses have ended. In between the device itself counts their tokens. A slot whose response
has ended, or that has none, idles: it repeats its last step, and its tokens go to the spare row of the results.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gspo.kernels.decode_types import Pool, Readers
from gspo.kernels.write_tokens import write_tokens
from gspo.rollout.kv_pages import pages_for
from gspo.rollout.slots import Slots

READ_TOGETHER = 16  # slots that read a prompt's pages in one program, at most; further ones read them again
SMALLEST_STEP = 8  # slots
FINE = 256  # slots above which steps have further sizes: products of so many rows take longer with each


def step_sizes(most: int) -> list[int]:
    """Return the slots that steps may have, from `most` down: halves, and above FINE three quarters as well.

    Few sizes, as a graph is captured for each.
    """
    sizes = [most]
    while sizes[-1] // 2 >= SMALLEST_STEP:
        if sizes[-1] > FINE:
            sizes.append(sizes[-1] * 3 // 4)
            sizes.append(sizes[-2] // 2)
        else:
            sizes.append(sizes[-1] // 2)
    return sizes


class Tables:
    """Tables of `most` slots, for prompts and responses up to these lengths, at most `n` responses to a prompt."""

    def __init__(self, slots: Slots, most: int, n: int, longest_prompt: int, longest_response: int):
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=slots.device)

        self.slots, self.most = slots, most
        self.state = zeros(3, most, dtype=torch.int64)
        self.rows, self.lengths, self.sizes = self.state  # of the results; tokens after the next step; of the prompt
        self.response_pages = zeros(most, pages_for(max(1, longest_response - 1), slots.responses.page))
        self.prompt_pages = zeros(most, pages_for(longest_prompt, slots.prompts.page))
        self.members = zeros(most, min(n, READ_TOGETHER))
        self.prompt_sizes, self.prompt_starts = zeros(most), zeros(most)
        self.alone = torch.arange(most, dtype=torch.int32, device=slots.device)[:, None].contiguous()

    def count(self) -> int:
        """Return the slots of a step: the least size that holds all responses."""
        return min(size for size in step_sizes(self.most) if size >= len(self.slots))

    def load(self, count: int, upto: np.ndarray, spare_row: int) -> None:
        """Write the tables of `count` slots, with pages for the first `upto` [S] tokens of each of the S responses.

        The slots after them idle on a free page and write to the row `spare_row` of the results.
        """
        slots, empty = self.slots, count - len(self.slots)
        slots.reserve(upto)
        # Slots that see equally much of a prompt read it together.
        pairs, which = np.unique(np.stack([slots.prompt, slots.seen], 1), axis=0, return_inverse=True)
        numbers, number_of_pair = np.unique(pairs[:, 0], return_inverse=True)
        number_of_pair, sizes = np.append(number_of_pair, len(numbers)), np.append(pairs[:, 1], 0)
        which = np.concatenate([which.reshape(-1), np.full(empty, len(pairs))])
        state = np.zeros((3, count), dtype=np.int64)
        state[0] = np.concatenate([slots.rows, np.full(empty, spare_row)])
        state[1] = np.concatenate([slots.length + 1, np.ones(empty, dtype=np.int64)])
        state[2] = sizes[which]
        own = np.full((count, self.response_pages.shape[1]), slots.responses.spare if empty else 0)
        _fill(own, slots.responses.owner, slots.responses.start // slots.responses.page)

        known = np.searchsorted(numbers, slots.prompts.owner).clip(max=len(numbers) - 1)
        owner = np.where(numbers[known] == slots.prompts.owner, known, -1)
        pages = np.zeros((len(numbers) + 1, self.prompt_pages.shape[1]), dtype=np.int64)
        _fill(pages, owner, slots.prompts.start // slots.prompts.page)
        prompt, members = _shared_reads(which, self.members.shape[1], count)
        for table, values in (
            (self.state[:, :count], state),
            (self.response_pages[:count], own),
            (self.prompt_pages[:count], pages[number_of_pair[prompt]]),
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
    """Enter page i as number place[i] of owner[i]; -1: free."""
    used = np.flatnonzero(owner >= 0)
    table[owner[used], place[used]] = used


def _shared_reads(which: np.ndarray, most: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Group slots that read a prompt's pages together, at most `most` in a group; which [S] is the prompt of each slot.

    -> the prompt [count] and the slots [count, most], -1: none, of each group. Groups after the last one have no slots,
    and the last prompt.
    """
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
    """One new token for each of the first S slots of the tables; everything it computes stays on the device."""

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
        return prompts, Readers(t.response_pages[first], t.alone[first], self.lengths.int(), self._sizes.int())

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the new keys and values [S, Hk, D] to their pages."""
        pool, heads = self._tables.slots.responses, keys.shape[1]
        if heads not in self._places:
            last = self.lengths - 1
            page = self._tables.response_pages[: self._count].gather(1, (last // pool.page)[:, None])[:, 0]
            self._places[heads] = pool.places(page.long(), last % pool.page, heads)
        write_tokens(pool.keys[layer], pool.values[layer], self._places[heads], keys, values)

    def pools(self, layer: int) -> tuple[Pool, Pool]:
        """Return the pages of prompts and of responses in a layer, with who reads which."""
        slots = self._tables.slots
        kept = ((pool.keys[layer], pool.values[layer]) for pool in (slots.prompts, slots.responses))
        return tuple(Pool(*x, readers) for x, readers in zip(kept, self._readers, strict=True))

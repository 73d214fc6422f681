"""Keep the tables of the slots: which response each one grows, and which pages hold its keys and values.

A prompt's pages are written once and read by all its responses together; a response's pages are read by its own slot.
A slot is one entry of a few small tables. When a response ends, its pages are freed and its slot is dropped; the next
waiting response gets a slot of its own, and no keys or values are moved for it.
"""

import numpy as np
import torch
from torch import Tensor

from gspo.rollout.attention_inputs import Prefill, Step, pack_prompts
from gspo.rollout.kept_keys import KeptKeys
from gspo.rollout.kv_pages import FAR, Layer, Pages, Plan, pages_for


class Slots:
    """S slots in use. Each holds its response's row in the results, the number of its prompt, how many of the prompt's
    tokens it sees, and how many of the response's tokens have keys and values in pages of its own: the newest token has
    none until the step that reads it."""

    def __init__(self, layout: dict[int, Layer], plan: Plan, device: torch.device):
        self.device = device
        self.prompts = Pages(layout, plan.prompt_pages, device, plan.prompt_page)
        self.responses = Pages(layout, plan.response_pages, device, plan.page)
        self.sizes: dict[int, int] = {}  # number of a prompt that is in memory -> its tokens
        self.rows = self.prompt = self.seen = self.length = np.zeros(0, dtype=np.int64)  # [S] each

    def __len__(self) -> int:
        return len(self.rows)

    def fits(self, sizes: list[int]) -> bool:
        """Tell whether prompts of these sizes fit into the free pages."""
        return sum(pages_for(size, self.prompts.page) for size in sizes) <= self.prompts.free

    def prefill(self, numbers: list[int], prompts: list[tuple[int, ...]]) -> Prefill:
        """Prepare the forward over these prompts, which writes keys and values to pages owned by `numbers`."""
        prefill, page = pack_prompts(prompts, self.device), self.prompts.page
        pages = self._take_pages(numbers, prefill.sizes)
        prefill.pages, prefill.offsets = self._tensor(pages), prefill.positions[0] % page
        prefill.pool = self.prompts
        return prefill

    def begin_like(self, trunks: list[int], kept: KeptKeys, numbers: list[int], sizes: list[int]) -> None:
        """Copy the first `sizes` tokens of kept trunks, their prompts included, to pages owned by `numbers`."""
        where = self.prompts.tokens_at(self._take_pages(numbers, sizes), sizes)
        for layer, keys in self.prompts.keys.items():
            places = self.prompts.places(*where, keys.shape[1])
            pairs = [kept.read(row, layer, size) for row, size in zip(trunks, sizes, strict=True)]
            self.prompts.write(layer, places, *(torch.cat(x).flatten(0, 1) for x in zip(*pairs, strict=True)))
        kept.used.update(trunks)
        self.prompts.attention_kinds_seen |= kept.attention_kinds_seen

    def copy_ended(self, ended: np.ndarray, kept: KeptKeys) -> None:
        """Copy keys and values of the responses in slots `ended` [S], and of their prompts, if `kept` has room."""
        slots = np.flatnonzero(ended)
        numbers, lengths = self.prompt[slots].tolist(), self.length[slots].tolist()
        new = [number for number in dict.fromkeys(numbers) if not kept.has_prompt(number)]
        sizes = [self.sizes[number] for number in new]
        if kept.bytes + (sum(sizes) + sum(lengths)) * self.responses.token_bytes > kept.room:
            return
        prompts = dict(zip(new, self.prompts.copies(new, sizes), strict=True)) if new else {}
        responses = self.responses.copies(slots.tolist(), lengths)
        kept.add(prompts, self.rows[slots].tolist(), numbers, responses)
        kept.attention_kinds_seen |= self.prompts.attention_kinds_seen

    def _take_pages(self, numbers: list[int], sizes: list[int]) -> np.ndarray:
        """Take pages for prompts of these sizes -> the page of each of their tokens [T]."""
        pages, page = [], self.prompts.page
        for number, size in zip(numbers, sizes, strict=True):
            starts = np.arange(0, size, page)
            mine = self.prompts.take(np.full(len(starts), number), starts)
            pages.append(mine.repeat(page)[:size])
            self.sizes[number] = size
        return np.concatenate(pages)

    def forget(self, numbers: list[int]) -> None:
        """Free the pages of prompts all of whose responses have ended."""
        for number in numbers:
            self.prompts.release(self.prompts.owner == number)
            del self.sizes[number]

    def seat(self, rows: list[int], prompts: list[int], seen: list[int] | None = None) -> None:
        """Add slots for these rows of the results, each with the number of its prompt, and how many tokens of it the
        response sees (None: all)."""
        seen = [self.sizes[number] for number in prompts] if seen is None else seen
        self.seen = np.concatenate([self.seen, np.array(seen, dtype=np.int64)])
        self.rows = np.concatenate([self.rows, np.array(rows, dtype=np.int64)])
        self.prompt = np.concatenate([self.prompt, np.array(prompts, dtype=np.int64)])
        self.length = np.concatenate([self.length, np.zeros(len(rows), dtype=np.int64)])

    def keep(self, going_on: np.ndarray) -> None:
        """Drop the slots for which `going_on` [S] is false, and free their pages; the others close up."""
        owner = self.responses.owner
        self.responses.release((owner >= 0) & ~going_on[owner])
        self.responses.owner = np.where(owner >= 0, (going_on.cumsum() - 1)[owner], -1)
        tables = (self.rows, self.prompt, self.seen, self.length)
        self.rows, self.prompt, self.seen, self.length = (x[going_on] for x in tables)

    def reserve(self, upto: np.ndarray) -> None:
        """Take the further pages that the first `upto` [S] tokens of the responses need, for a block of steps."""
        page = self.responses.page
        have = -(-self.length // page)
        more = -(-upto // page) - have
        owners = np.repeat(np.arange(len(self)), more)
        nth = np.arange(len(owners)) - np.repeat(more.cumsum() - more, more)
        self.responses.take(owners, (have[owners] + nth) * page)

    def step(self) -> Step:
        """Take room for one more token in every slot and return the tables of the step that computes it, on CPUs."""
        page, offset = self._next_position()
        self.length = self.length + 1
        numbers, which = np.unique(self.prompt, return_inverse=True)
        sizes = np.array([self.sizes[number] for number in numbers.tolist()])
        members, member_index = _members(which)
        self.prompts.compact()
        owner = self.prompts.owner[: self.prompts.reach]
        known = np.searchsorted(numbers, owner).clip(max=len(numbers) - 1)
        read = numbers[known] == owner  # false for prompts whose responses all wait for a slot
        page_owner = self.responses.owner[: self.responses.reach]
        t = self._tensor
        return Step(
            positions=t(self.seen + self.length - 1)[:, None],
            lengths=t(self.length),
            responses=self.responses,
            page=t(page),
            offset=t(offset),
            response_owner=t(page_owner.clip(min=0)),
            response_only=self._single_pages(np.arange(len(self)), page_owner),
            response_start=t(np.where(page_owner >= 0, self.responses.start[: len(page_owner)], FAR)),
            prompts=self.prompts,
            prompt_owner=t(np.where(read, known, 0)),
            prompt_only=self._single_pages(numbers, owner),
            prompt_start=t(np.where(read, self.prompts.start[: len(owner)], FAR)),
            prompt_sizes=t(sizes),
            prompt_seen=t(self.seen) if (self.seen < sizes[which]).any() else None,
            members=t(members),
            member_index=t(member_index),
            prompt_of_slot=t(which),
        )

    def _next_position(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the page [S] and the offset in it [S] of each slot's next token; take a page where one begins."""
        size, pool = self.responses.page, self.responses
        fresh = np.flatnonzero(self.length % size == 0)
        pool.take(fresh, self.length[fresh])
        pool.compact()
        used = np.flatnonzero(pool.owner >= 0)
        last = used[pool.start[used] == self.length[pool.owner[used]] // size * size]
        page = np.empty_like(self.length)
        page[pool.owner[last]] = last
        return page, self.length % size

    def _single_pages(self, owners: np.ndarray, owner: np.ndarray) -> Tensor | None:
        """Return the page of each of `owners`, in their ascending order, if each has exactly one; else None. `owner`
        has every page's owner."""
        pages = np.flatnonzero(np.isin(owner, owners))
        return self._tensor(pages[owner[pages].argsort()]) if len(pages) == len(owners) else None

    def _tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device)


def _members(which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group the S slots by prompt: which [S], the prompt of each -> the slots of each of B prompts [B, M], M the most
    that one has, and each slot's index in that table [S]."""
    order, counts = which.argsort(kind="stable"), np.bincount(which)
    nth = np.empty_like(which)
    nth[order] = np.arange(len(which)) - (counts.cumsum() - counts)[which[order]]
    members = np.zeros((len(counts), counts.max()), dtype=np.int64)
    members[which, nth] = np.arange(len(which))
    return members, which * members.shape[1] + nth

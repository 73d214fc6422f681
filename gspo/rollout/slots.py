"""Where the sampler keeps keys and values: the prompts' once each, the answers' one row a slot, both in pages.

A page holds the keys and values of PAGE tokens of one owner, in every layer. Prompts' pages are read by all the answers
to a prompt at once; answers' pages by their own slot. A slot is a row of a few small tables: an answer that ends gives
its pages back, one that waits takes its row, and no key or value is ever moved for it.
"""

import numpy as np
import torch
from torch import Tensor

from gspo.rollout.pages import FAR, Layer, Pages, Plan, pages_for
from gspo.rollout.steps import Prefill, Step, side_by_side


class Slots:
    """The tables: which slot answers which prompt for which row of the results, and how long its answer is."""

    def __init__(self, layout: dict[int, Layer], plan: Plan, device: torch.device):
        self.device = device
        self.prompts = Pages(layout, plan.prompt_pages, device, plan.prompt_page)
        self.answers = Pages(layout, plan.answer_pages, device, plan.page)
        self.sizes: dict[int, int] = {}  # prompts that are here: number -> tokens
        nothing = np.zeros(0, dtype=np.int64)
        self.rows, self.prompt, self.length = nothing, nothing, nothing  # [S] each

    def __len__(self) -> int:
        return len(self.rows)

    def fits(self, sizes: list[int]) -> bool:
        return sum(pages_for(size, self.prompts.page) for size in sizes) <= self.prompts.free

    def prefill(self, numbers: list[int], prompts: list[tuple[int, ...]]) -> Prefill:
        """A pass over these prompts that leaves keys and values in pages owned by `numbers`."""
        p, page = side_by_side(prompts, self.device), self.prompts.page
        pages = []
        for number, ids in zip(numbers, prompts, strict=True):
            starts = np.arange(0, len(ids), page)
            mine = self.prompts.take(np.full(len(starts), number), starts)
            pages.append(mine.repeat(page)[: len(ids)])
            self.sizes[number] = len(ids)
        p.pages, p.offsets = self._tensor(np.concatenate(pages)), p.positions[0] % page
        p.pool = self.prompts
        return p

    def forget(self, numbers: list[int]) -> None:
        """Free the pages of prompts that have no answer under way or to come."""
        for number in numbers:
            self.prompts.release(self.prompts.owner == number)
            del self.sizes[number]

    def seat(self, rows: list[int], prompts: list[int]) -> None:
        """Further slots, for these rows of the results, each with the number of its prompt."""
        self.rows = np.concatenate([self.rows, np.array(rows, dtype=np.int64)])
        self.prompt = np.concatenate([self.prompt, np.array(prompts, dtype=np.int64)])
        self.length = np.concatenate([self.length, np.zeros(len(rows), dtype=np.int64)])

    def keep(self, going_on: np.ndarray) -> None:
        """Drop the slots [S] that are not going on; the rest move together."""
        owner = self.answers.owner
        self.answers.release((owner >= 0) & ~going_on[owner])
        self.answers.owner = np.where(owner >= 0, (going_on.cumsum() - 1)[owner], -1)
        self.rows, self.prompt, self.length = (x[going_on] for x in (self.rows, self.prompt, self.length))

    def reserve(self, upto: np.ndarray) -> None:
        """Take the pages that the first `upto` [S] tokens of the answers need beyond those kept."""
        page = self.answers.page
        have = -(-self.length // page)
        more = -(-upto // page) - have
        owners = np.repeat(np.arange(len(self)), more)
        nth = np.arange(len(owners)) - np.repeat(more.cumsum() - more, more)
        self.answers.take(owners, (have[owners] + nth) * page)

    def step(self) -> Step:
        """Make room for one more token in every slot, and say where everything lies."""
        page, offset = self._places()
        self.length = self.length + 1
        numbers, which = np.unique(self.prompt, return_inverse=True)
        sizes = np.array([self.sizes[number] for number in numbers.tolist()])
        members, place = _members(which)
        self.prompts.gather()
        owner = self.prompts.owner[: self.prompts.reach]
        known = np.searchsorted(numbers, owner).clip(max=len(numbers) - 1)
        asked = numbers[known] == owner  # not the pages of prompts whose answers all wait
        answers = self.answers.owner[: self.answers.reach]
        t = self._tensor
        return Step(
            positions=t(sizes[which] + self.length - 1)[:, None],
            lengths=t(self.length),
            answers=self.answers,
            page=t(page),
            offset=t(offset),
            answer_owner=t(answers.clip(min=0)),
            answer_only=self._only(np.arange(len(self)), answers),
            answer_start=t(np.where(answers >= 0, self.answers.start[: len(answers)], FAR)),
            prompts=self.prompts,
            prompt_owner=t(np.where(asked, known, 0)),
            prompt_only=self._only(numbers, owner),
            prompt_start=t(np.where(asked, self.prompts.start[: len(owner)], FAR)),
            prompt_sizes=t(sizes),
            members=t(members),
            place=t(place),
            asks=t(which),
        )

    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """-> the page and the place in it [S] of each slot's next token; a page is taken where one begins."""
        size, pool = self.answers.page, self.answers
        fresh = np.flatnonzero(self.length % size == 0)
        pool.take(fresh, self.length[fresh])
        pool.gather()
        used = np.flatnonzero(pool.owner >= 0)
        last = used[pool.start[used] == self.length[pool.owner[used]] // size * size]
        page = np.empty_like(self.length)
        page[pool.owner[last]] = last
        return page, self.length % size

    def _only(self, owners: np.ndarray, owner: np.ndarray) -> Tensor | None:
        """The one page of each of `owners`, ascending, in pages owned by `owner`; None if some have several."""
        pages = np.flatnonzero(np.isin(owner, owners))
        return self._tensor(pages[owner[pages].argsort()]) if len(pages) == len(owners) else None

    def _tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device)


def _members(which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """which [S], the prompt that a slot answers -> members [B, M], the slots of each, and a slot's index in it [S]."""
    order, counts = which.argsort(kind="stable"), np.bincount(which)
    nth = np.empty_like(which)
    nth[order] = np.arange(len(which)) - (counts.cumsum() - counts)[which[order]]
    members = np.zeros((len(counts), counts.max()), dtype=np.int64)
    members[which, nth] = np.arange(len(which))
    return members, which * members.shape[1] + nth

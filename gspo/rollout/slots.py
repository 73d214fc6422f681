"""Where the sampler keeps keys and values: the prompts' once each, the answers' one row a slot, both in pages.

A page holds the keys and values of PAGE tokens of one owner, in every layer. Prompts' pages are read by all the answers
to a prompt at once; answers' pages by their own slot. A slot is a row of a few small tables: an answer that ends gives
its pages back, one that waits takes its row, and no key or value is ever moved for it.
"""

import heapq
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspo.kernels.decode_cpu import Sequences
from gspo.kernels.rows import Rows
from gspo.kernels.varlen import Segments

PAGE = 64  # tokens
FAR = 2**62  # first position of a page that nobody reads
HIDDEN = -1e30  # added to the scores of what is not seen; finite, so that a page without anything seen gives no NaN


@dataclass(frozen=True)
class Layer:
    """What one layer keeps of a token on this rank: `heads` keys of `key_dim` numbers and values of `value_dim`."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


def pages_for(tokens: int, page: int = PAGE) -> int:
    return -(-tokens // page)


@dataclass(frozen=True)
class Plan:
    """What is allocated: answers generated at the same time, and the pages and their sizes, in tokens."""

    slots: int
    prompt_pages: int
    answer_pages: int
    page: int = PAGE
    prompt_page: int = PAGE


class Pages:
    """A pool of pages with their owners. Those in use lie among the first `reach`, which is what attention reads."""

    def __init__(self, layout: dict[int, Layer], count: int, device: torch.device, page: int = PAGE):
        def room(layer: Layer, width: int) -> Tensor:  # zeros: what was never written must not be NaN
            return torch.zeros(count, layer.heads, page, width, dtype=layer.dtype, device=device)

        self.page, self.count = page, count
        self.keys = {i: room(layer, layer.key_dim) for i, layer in layout.items()}
        self.values = {i: room(layer, layer.value_dim) for i, layer in layout.items()}
        self.owner = np.full(count, -1)
        self.start = np.zeros(count, dtype=np.int64)  # position of a page's first token in its sequence
        self._free = list(range(count))
        self.asked: set[tuple[float, float | None, int | None]] = set()  # scale, cap and window of its layers

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for part in (self.keys, self.values) for x in part.values())

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def reach(self) -> int:
        used = np.flatnonzero(self.owner >= 0)
        return int(used[-1]) + 1 if len(used) else 0

    @property
    def spare(self) -> int:
        """A page that nobody has."""
        assert self._free, "every page has an owner"
        return self._free[0]

    def take(self, owners: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Page numbers, the lowest that are free, for these owners and first positions."""
        assert len(owners) <= self.free, "pages were promised that are not there"
        pages = np.array([heapq.heappop(self._free) for _ in owners], dtype=np.int64)
        self.owner[pages], self.start[pages] = owners, starts
        return pages

    def release(self, gone: np.ndarray) -> None:
        """Free the pages of which `gone` [count] is true."""
        for page in np.flatnonzero(gone).tolist():
            heapq.heappush(self._free, page)
        self.owner[gone] = -1

    def write(self, layer: int, where: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys, values [T * Hk, D] at `where` [T * Hk], of `places`."""
        self.keys[layer].view(-1, keys.shape[1]).index_copy_(0, where, keys)
        self.values[layer].view(-1, values.shape[1]).index_copy_(0, where, values)

    def places(self, pages: Tensor, offsets: Tensor, heads: int) -> Tensor:
        """[T * Hk]: which rows of [count * Hk * page] are those at `offsets` [T] of `pages` [T]."""
        head = torch.arange(heads, device=pages.device)
        return ((pages[:, None] * heads + head) * self.page + offsets[:, None]).flatten()

    def read(self, layer: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `count` pages, [count, Hk, page, D]."""
        return self.keys[layer][:count], self.values[layer][:count]

    def gather(self) -> None:
        """Move pages down into free ones when most of those read are free: the last long answers are then cheap."""
        used = np.flatnonzero(self.owner >= 0)
        if self.reach <= 2 * len(used):
            return
        free = np.flatnonzero(self.owner[: len(used)] < 0)
        moved = used[used >= len(used)]
        for x in (*self.keys.values(), *self.values.values()):
            x[torch.from_numpy(free)] = x[torch.from_numpy(moved)]
        self.owner[free], self.start[free] = self.owner[moved], self.start[moved]
        self.owner[moved] = -1
        self._free = list(range(len(used), self.count))


@dataclass(eq=False)
class Prefill:
    """Prompts side by side, T tokens without padding: what the model's forward over them needs."""

    ids: Tensor  # [1, T]
    positions: Tensor  # [1, T]
    last: Tensor  # [B], where each prompt ends
    sizes: list[int]  # B
    pages: Tensor | None = None  # [T], where its keys and values go
    offsets: Tensor | None = None  # [T]
    pool: Pages | None = None  # None: nothing is kept but the layout
    layout: dict[int, Layer] = field(default_factory=dict)
    _places: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _bias: dict[tuple, Tensor] = field(default_factory=dict, repr=False)
    _segments: dict[int | None, Segments] = field(default_factory=dict, repr=False)

    def places(self, heads: int) -> Tensor:
        """[T * Hk]: where in the pool its keys and values go."""
        if heads not in self._places:
            self._places[heads] = self.pool.places(self.pages, self.offsets, heads)
        return self._places[heads]

    def segments(self, window: int | None) -> Segments:
        """The prompts, each of which attends causally to itself."""
        if window not in self._segments:
            sizes = torch.tensor(self.sizes)
            self._segments[window] = Segments.of(sizes, sizes, True, window, self.ids.device)
        return self._segments[window]

    @cached_property
    def rows(self) -> Rows:
        """The prompts as compiled code wants them (kernels/rows.py)."""
        return Rows.apart(self.sizes)

    def bias(self, at: int, end: int, first: int, window: int | None) -> Tensor:
        """[end - at, end - first]: HIDDEN where a prompt's tokens from `at` to `end` do not see those from `first`."""
        if (key := (at, end, first, window)) not in self._bias:
            query = torch.arange(at, end, device=self.ids.device)[:, None]
            other = torch.arange(first, end, device=self.ids.device)
            seen = other <= query if window is None else (other <= query) & (other > query - window)
            self._bias[key] = _bias(seen)
        return self._bias[key]


@dataclass(eq=False)
class Step:
    """One new token for each of S slots, asked of B prompts by at most M slots each."""

    positions: Tensor  # [S, 1]
    lengths: Tensor  # [S], tokens of the answer kept, the new one included
    answers: Pages
    page: Tensor  # [S], where the new token's keys and values go
    offset: Tensor  # [S]
    answer_owner: Tensor  # [n], the slot that each page belongs to; 0 for free ones, which are hidden
    answer_only: Tensor | None  # [S], the page of each slot, if none has more
    answer_start: Tensor  # [n]; so far behind that nothing is seen, for free ones
    prompts: Pages
    prompt_owner: Tensor  # [m], the place among the B prompts
    prompt_only: Tensor | None  # [B]
    prompt_start: Tensor  # [m]
    prompt_sizes: Tensor  # [B]
    members: Tensor  # [B, M], slots that answer each prompt; 0 where there are fewer
    place: Tensor  # [S], each slot's index in [B * M]
    asks: Tensor  # [S], the place of each slot's prompt among the B
    _bias: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    _places: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _sequences: dict[int | None, tuple[Sequences, Sequences]] = field(default_factory=dict, repr=False)

    @property
    def pools(self) -> tuple[Pages, Pages]:
        return self.prompts, self.answers

    def sequences(self, window: int | None) -> tuple[Sequences, Sequences]:
        """The prompts and the answers as compiled code wants them (kernels/decode_cpu.py)."""
        if window not in self._sequences:
            lengths, which, sizes = self.lengths.numpy(), self.asks.numpy(), self.prompt_sizes.numpy()
            far = self.positions[:, 0].numpy() + 1 if window is None else window
            self._sequences[window] = (
                _sequences(self.prompt_owner, self.prompt_start, sizes, which, sizes[which] + lengths - far),
                _sequences(self.answer_owner, self.answer_start, lengths, np.arange(len(lengths)), lengths - far),
            )
        return self._sequences[window]

    def places(self, heads: int) -> Tensor:
        """[S * Hk]: where among the answers' pages the new keys and values go."""
        if heads not in self._places:
            self._places[heads] = self.answers.places(self.page, self.offset, heads)
        return self._places[heads]

    def answer_bias(self, window: int | None) -> Tensor:
        """[n, 1, 1, page]: HIDDEN where a page holds nothing that its slot sees."""
        if (key := ("answer", window)) not in self._bias:
            at = self.answer_start[:, None] + torch.arange(self.answers.page, device=self.lengths.device)
            length = self.lengths.index_select(0, self.answer_owner)[:, None]
            seen = at < length if window is None else (at < length) & (at >= length - window)
            self._bias[key] = _bias(seen)[:, None, None]
        return self._bias[key]

    def prompt_bias(self, window: int | None, group: int) -> Tensor:
        """[m, 1, 1 or M * group, page]: the same for the pages of prompts, `group` query heads a KV head."""
        if (key := ("prompt", window, group)) not in self._bias:
            at = self.prompt_start[:, None] + torch.arange(self.prompts.page, device=self.lengths.device)
            size = self.prompt_sizes.index_select(0, self.prompt_owner)
            seen = (at < size[:, None])[:, None]
            if window is not None:
                length = self.lengths.index_select(0, self.members.flatten()).view(self.members.shape)
                first = size[:, None] + length.index_select(0, self.prompt_owner) - window  # [m, M]
                seen = (seen & (at[:, None] >= first[..., None])).repeat_interleave(group, 1)
            self._bias[key] = _bias(seen)[:, None]
        return self._bias[key]


def _sequences(owner: Tensor, start: Tensor, sizes: np.ndarray, which: np.ndarray, hidden: np.ndarray) -> Sequences:
    """Pages owned by `owner` [n] from position `start` [n] on, in order, for slots that read sequence `which` [S]."""
    owner, start = owner.numpy(), start.numpy()
    pages = np.lexsort((start, owner))
    pages = pages[start[pages] < FAR]
    counts = np.bincount(owner[pages], minlength=len(sizes))
    return Sequences.of(pages, counts, sizes, which, hidden.clip(min=0))


def _bias(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, HIDDEN)


def side_by_side(prompts: list[tuple[int, ...]], device: torch.device) -> Prefill:
    """A pass over these prompts that keeps nothing yet."""
    sizes = [len(ids) for ids in prompts]
    ends = list(accumulate(sizes))
    return Prefill(
        ids=torch.tensor([list(chain.from_iterable(prompts))], device=device),
        positions=torch.cat([torch.arange(size) for size in sizes])[None].to(device),
        last=torch.tensor(ends, device=device) - 1,
        sizes=sizes,
    )


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

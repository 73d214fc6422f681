"""Hold what attention needs to know in a forward of the sampler: of a prefill, or of one new token for each slot."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspo.kernels.decode_attention_cpu import Sequences
from gspo.kernels.packed_attention_cpu import Rows
from gspo.kernels.segment_attention import Segments
from gspo.rollout.kv_pages import FAR, Layer, Pages

HIDDEN = -1e30  # added to the scores of keys that are not seen; finite, so that a page with none seen gives no NaN


@dataclass(eq=False)
class Prefill:
    """B prompts of T tokens together, one after the other without padding."""

    ids: Tensor  # [1, T]
    positions: Tensor  # [1, T]
    last: Tensor  # [B], index of each prompt's last token
    sizes: list[int]  # B
    pages: Tensor | None = None  # [T], where keys and values are written
    offsets: Tensor | None = None  # [T]
    pool: Pages | None = None  # None: only the layout is recorded
    layout: dict[int, Layer] = field(default_factory=dict)
    _places: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _bias: dict[tuple, Tensor] = field(default_factory=dict, repr=False)
    _segments: dict[int | None, Segments] = field(default_factory=dict, repr=False)

    def places(self, heads: int) -> Tensor:
        """Return where in the pool keys and values are written: [T * Hk]."""
        if heads not in self._places:
            self._places[heads] = self.pool.places(self.pages, self.offsets, heads)
        return self._places[heads]

    def segments(self, window: int | None) -> Segments:
        """Return the prompts as segments that attend causally to themselves."""
        if window not in self._segments:
            sizes = torch.tensor(self.sizes)
            self._segments[window] = Segments.of(sizes, sizes, True, window, self.ids.device)
        return self._segments[window]

    @cached_property
    def rows(self) -> Rows:
        """Return the prompts as kernels/packed_attention_cpu.py takes them."""
        return Rows.apart(self.sizes)

    def bias(self, at: int, end: int, first: int, window: int | None) -> Tensor:
        """[end - at, end - first]: HIDDEN where queries `at` to `end` do not see keys `first` to `end`."""
        if (key := (at, end, first, window)) not in self._bias:
            query = torch.arange(at, end, device=self.ids.device)[:, None]
            other = torch.arange(first, end, device=self.ids.device)
            seen = other <= query if window is None else (other <= query) & (other > query - window)
            self._bias[key] = _bias(seen)
        return self._bias[key]


@dataclass(eq=False)
class Step:
    """One new token for each of S slots, whose responses belong to B prompts, at most M of them to one prompt."""

    positions: Tensor  # [S, 1]
    lengths: Tensor  # [S], tokens of each response, the new one included
    responses: Pages
    page: Tensor  # [S], where the new token's keys and values are written
    offset: Tensor  # [S]
    response_owner: Tensor  # [n], the slot that owns each page; 0 for free ones, which are hidden
    response_only: Tensor | None  # [S], the page of each slot, if each has only one
    response_start: Tensor  # [n], position of the page's first token; FAR for free ones
    prompts: Pages
    prompt_owner: Tensor  # [m], which of the B prompts owns each page
    prompt_only: Tensor | None  # [B]
    prompt_start: Tensor  # [m]
    prompt_sizes: Tensor  # [B]
    prompt_seen: Tensor | None  # [S], tokens of its prompt that each slot sees; None: all
    members: Tensor  # [B, M], the slots of each prompt; 0 where there are fewer
    member_index: Tensor  # [S], each slot's index in [B * M]
    prompt_of_slot: Tensor  # [S], which of the B prompts
    _bias: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    _places: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _sequences: dict[int | None, tuple[Sequences, Sequences]] = field(default_factory=dict, repr=False)

    @property
    def pools(self) -> tuple[Pages, Pages]:
        return self.prompts, self.responses

    def sequences(self, window: int | None) -> tuple[Sequences, Sequences]:
        """Return prompts and responses in the form that compiled code takes (kernels/decode_attention_cpu.py)."""
        if window not in self._sequences:
            lengths, which, sizes = self.lengths.numpy(), self.prompt_of_slot.numpy(), self.prompt_sizes.numpy()
            far = self.positions[:, 0].numpy() + 1 if window is None else window
            if self.prompt_seen is None:
                hidden = sizes[which] + lengths - far
                prompts = _sequences(self.prompt_owner, self.prompt_start, sizes, which, hidden)
            else:
                prompts = self._beginnings(self.prompt_seen.numpy() + lengths - far)
            self._sequences[window] = (
                prompts,
                _sequences(self.response_owner, self.response_start, lengths, np.arange(len(lengths)), lengths - far),
            )
        return self._sequences[window]

    def _beginnings(self, hidden: np.ndarray) -> Sequences:
        """Return the beginnings of prompts that slots see, as sequences of their own on the prompts' pages."""
        owner, start = self.prompt_owner.numpy(), self.prompt_start.numpy()
        pages = np.lexsort((start, owner))
        pages = pages[start[pages] < FAR]
        counts = np.bincount(owner[pages], minlength=len(self.prompt_sizes))
        slots = np.stack([self.prompt_of_slot.numpy(), self.prompt_seen.numpy()], 1)
        pairs, which = np.unique(slots, axis=0, return_inverse=True)
        prompt, sizes = pairs.T
        mine = -(-sizes // self.prompts.page)
        nth = np.arange(mine.sum()) - np.repeat(mine.cumsum() - mine, mine)
        read = pages[np.repeat((counts.cumsum() - counts)[prompt], mine) + nth]
        return Sequences.of(read, mine, sizes, which.reshape(-1), hidden.clip(min=0))

    def places(self, heads: int) -> Tensor:
        """Return where in the responses' pages the new keys and values are written: [S * Hk]."""
        if heads not in self._places:
            self._places[heads] = self.responses.places(self.page, self.offset, heads)
        return self._places[heads]

    def response_bias(self, window: int | None) -> Tensor:
        """[n, 1, 1, page]: HIDDEN where a page holds nothing that its slot sees."""
        if (key := ("response", window)) not in self._bias:
            at = self.response_start[:, None] + torch.arange(self.responses.page, device=self.lengths.device)
            length = self.lengths.index_select(0, self.response_owner)[:, None]
            seen = at < length if window is None else (at < length) & (at >= length - window)
            self._bias[key] = _bias(seen)[:, None, None]
        return self._bias[key]

    def prompt_bias(self, window: int | None, group: int) -> Tensor:
        """[m, 1, 1 or M * group, page]: the same for the pages of prompts, `group` query heads a KV head."""
        if (key := ("prompt", window, group)) not in self._bias:
            at = self.prompt_start[:, None] + torch.arange(self.prompts.page, device=self.lengths.device)
            size = self.prompt_sizes.index_select(0, self.prompt_owner)[:, None]
            if self.prompt_seen is not None:
                size = self._of_members(self.prompt_seen)
            seen = at[:, None] < size[..., None]  # [m, 1 or M, page]
            if window is not None:
                first = size + self._of_members(self.lengths) - window
                seen = seen & (at[:, None] >= first[..., None])
            if self.prompt_seen is not None or window is not None:
                seen = seen.repeat_interleave(group, 1)
            self._bias[key] = _bias(seen)[:, None]
        return self._bias[key]

    def _of_members(self, values: Tensor) -> Tensor:
        """Return the values [S] of the slots that read each page of the prompts: [m, M]."""
        return values[self.members].index_select(0, self.prompt_owner)


def _sequences(owner: Tensor, start: Tensor, sizes: np.ndarray, which: np.ndarray, hidden: np.ndarray) -> Sequences:
    """Sort pages, owned by `owner` [n] from position `start` [n] on, for slots that read sequence `which` [S]."""
    owner, start = owner.numpy(), start.numpy()
    pages = np.lexsort((start, owner))
    pages = pages[start[pages] < FAR]
    counts = np.bincount(owner[pages], minlength=len(sizes))
    return Sequences.of(pages, counts, sizes, which, hidden.clip(min=0))


def _bias(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, HIDDEN)


def pack_prompts(prompts: list[tuple[int, ...]], device: torch.device) -> Prefill:
    """Lay prompts one after the other, for a forward that keeps no keys and values yet."""
    sizes = [len(ids) for ids in prompts]
    ends = list(accumulate(sizes))
    return Prefill(
        ids=torch.tensor([list(chain.from_iterable(prompts))], device=device),
        positions=torch.cat([torch.arange(size) for size in sizes])[None].to(device),
        last=torch.tensor(ends, device=device) - 1,
        sizes=sizes,
    )

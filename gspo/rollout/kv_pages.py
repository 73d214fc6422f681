"""Hold the KV cache: pages of PAGE tokens, each owned by one prompt or slot, and a list of the free pages."""

import heapq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gspo.rollout.kept_keys import Tokens

PAGE = 64  # tokens
FAR = 2**62  # start position of a page that must not be read


@dataclass(frozen=True)
class Layer:
    """What one layer keeps of a token on this rank: `heads` keys [key_dim] and values [value_dim]."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


def pages_for(tokens: int, page: int = PAGE) -> int:
    """Return how many pages so many tokens take."""
    return -(-tokens // page)


@dataclass(frozen=True)
class Plan:
    """What is allocated: slots, and pages with their sizes in tokens."""

    slots: int
    prompt_pages: int
    response_pages: int
    page: int = PAGE
    prompt_page: int = PAGE

    @property
    def tokens(self) -> int:
        return self.prompt_pages * self.prompt_page + self.response_pages * self.page


class Pages:
    """A pool of `count` pages with their owners. Attention reads the first `reach`, which hold all pages in use."""

    def __init__(self, layout: dict[int, Layer], count: int, device: torch.device, page: int = PAGE):
        def allocate(layer: Layer, width: int) -> Tensor:  # zeros: memory that was never written must not be NaN
            return torch.zeros(count, layer.heads, page, width, dtype=layer.dtype, device=device)

        self.page, self.count, self.device = page, count, device
        self.token_bytes = sum(layer.token_bytes for layer in layout.values())
        self.keys = {i: allocate(layer, layer.key_dim) for i, layer in layout.items()}
        self.values = {i: allocate(layer, layer.value_dim) for i, layer in layout.items()}
        self.owner = np.full(count, -1)  # number of a prompt or slot; -1: free
        self.start = np.zeros(count, dtype=np.int64)  # position of a page's first token in its sequence
        self._free = list(range(count))
        self.attention_kinds_seen: set[tuple[float, float | None, int | None]] = set()  # (scale, soft cap, window)

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
        """Return a free page, without taking it."""
        assert self._free, "every page has an owner"
        return self._free[0]

    def take(self, owners: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Take the lowest free pages for these owners and start positions -> their numbers."""
        assert len(owners) <= self.free, "more pages are taken than the plan allocated"
        pages = np.array([heapq.heappop(self._free) for _ in owners], dtype=np.int64)
        self.owner[pages], self.start[pages] = owners, starts
        return pages

    def release(self, released: np.ndarray) -> None:
        """Free the pages for which `released` [count] is true."""
        for page in np.flatnonzero(released).tolist():
            heapq.heappush(self._free, page)
        self.owner[released] = -1

    def write(self, layer: int, where: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys, values [T * Hk, D] at `where` [T * Hk], as `places` returns it."""
        self.keys[layer].view(-1, keys.shape[1]).index_copy_(0, where, keys)
        self.values[layer].view(-1, values.shape[1]).index_copy_(0, where, values)

    def places(self, pages: Tensor, offsets: Tensor, heads: int) -> Tensor:
        """Return the rows of [count * Hk * page] that belong to `offsets` [T] of `pages` [T]: [T * Hk]."""
        head = torch.arange(heads, device=pages.device)
        return ((pages[:, None] * heads + head) * self.page + offsets[:, None]).flatten()

    def copies(self, owners: list[int], sizes: list[int]) -> list[Tokens]:
        """Copy keys and values of the first `sizes` tokens of each of these owners."""
        pages = []
        for owner, size in zip(owners, sizes, strict=True):
            mine = np.flatnonzero(self.owner == owner)
            pages.append(mine[self.start[mine].argsort()].repeat(self.page)[:size])
        where = self.tokens_at(np.concatenate(pages), sizes)
        parts: list[Tokens] = [{} for _ in owners]
        for layer, keys in self.keys.items():
            heads = keys.shape[1]
            places = self.places(*where, heads)
            rows = (x.view(-1, x.shape[3])[places].view(-1, heads, x.shape[3]) for x in (keys, self.values[layer]))
            for part, *pair in zip(parts, *(x.split(sizes) for x in rows), strict=True):
                part[layer] = tuple(pair)
        return parts

    def tokens_at(self, pages: np.ndarray, sizes: list[int]) -> tuple[Tensor, Tensor]:
        """Return page and offset of each token of sequences of these sizes, on the device; pages [T]."""
        offsets = np.concatenate([np.arange(size) % self.page for size in sizes])
        return tuple(torch.from_numpy(x).to(self.device) for x in (pages, offsets))

    def read(self, layer: int, count: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first `count` pages, [count, Hk, page, D]."""
        return self.keys[layer][:count], self.values[layer][:count]

    def compact(self) -> None:
        """Move pages down into free ones when most of those read are free: then the last long responses stay cheap."""
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

"""Do to bfloat16 products what AMX does: multiply what lies behind a strided row's end by the tile's zero padding.

oneDNN on AMX reads an operand in place in tiles of 32 numbers where the row pitch leaves room for it. What lies between
the row's end and the tile's is multiplied by zeros, and 0 x NaN is NaN. Other processors do not read there, so a test
on them sees nothing; under this mode it does.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TILE = 32
PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "_addmm_activation", "_linear_pointwise"}


class TileReads(TorchDispatchMode):
    """`products` counts what was seen; `strided` lists (operand shape, strides) read in place with a tail; `unsafe`
    those with something not finite behind a row."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.strided, self.unsafe = 0, [], []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in PRODUCTS:
            return result
        operands = [x for x in args if isinstance(x, Tensor)]
        operands = (
            operands[:1] if name == "_linear_pointwise" else operands[-2:]
        )  # its weight is in a layout of its own
        if all(x.dtype == torch.bfloat16 for x in operands):
            self.products += 1
            spoilt = [self._reads(x) for x in (operands[0], *(x.mT for x in operands[1:]))]
            spoil(result, *spoilt)
        return result

    def _reads(self, x: Tensor) -> Tensor | None:
        """Rows [..., M] of x [..., M, K] behind which a tile would find something that is not finite, if any."""
        behind = tails(x)
        if behind is None:
            return None
        self.strided.append((tuple(x.shape), x.stride()))
        spoilt = ~behind.isfinite().all(-1)
        if not spoilt.any():
            return None
        self.unsafe.append((tuple(x.shape), x.stride()))
        return spoilt


def tails(x: Tensor) -> Tensor | None:
    """What lies between each row's end and its tile's, of x [..., M, K]: [..., M, tail]. None where nothing is read:
    rows that fill their tiles, or that lie one behind the other (those are copied first)."""
    width, pitch = x.shape[-1], x.stride(-2)
    tail = -width % TILE
    if x.numel() == 0 or tail == 0 or x.stride(-1) != 1 or pitch <= width or x.shape[-2] == 1:
        return None
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    first = torch.as_strided(
        torch.arange(len(storage)), x.shape[:-1], x.stride()[:-1], x.storage_offset()
    )  # of each row, its place in the storage
    at = first[..., None] + width + torch.arange(min(tail, pitch - width))
    return torch.where(at < len(storage), storage[at.clamp_max(len(storage) - 1)], 0.0)


def spoil(result: Tensor, rows: Tensor | None, columns: Tensor | None = None) -> None:
    """NaN where a tile would have read something that is not finite: rows [..., M], columns [..., N] of a product."""
    if rows is not None:
        result.masked_fill_(rows[..., None].expand_as(result), torch.nan)
    if columns is not None:
        result.masked_fill_(columns[..., None, :].expand_as(result), torch.nan)

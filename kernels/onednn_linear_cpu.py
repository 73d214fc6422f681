"""Multiply few rows by a linear layer's weight on a CPU with oneDNN, from a copy that it laid out once.

By PyTorch's own operators for it, which it keeps for its compiler. On processors with AMX oneDNN uses its tiles.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from gspo.kernels.amx_nan_guard import whole_tiles


@torch.no_grad()
def onednn_lay_out(weight: Tensor, rows: int) -> Tensor:
    """Copy a weight [N, K] to the layout that oneDNN chooses for products of about `rows` rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def onednn_linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return x [..., K] times a weight of `onednn_lay_out`, plus bias: [..., N]."""
    return torch.ops.mkldnn._linear_pointwise(whole_tiles(x), weight, bias, "none", [], "")


@functools.lru_cache
@torch.no_grad()
def onednn_works(dtype: torch.dtype) -> bool:
    """Tell by a trial whether these operators exist in this PyTorch, and multiply."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=g).to(dtype) for shape in ((2, 3, 40), (24, 40), (24,)))
    try:
        found = onednn_linear(onednn_lay_out(weight, 6), bias, x)
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(found.float(), F.linear(x, weight, bias).float(), rtol=0.02, atol=0.05)

"""Lay out the weights of linear layers for each rollout, in the order in which CPU matrix products read them.

A decoding step multiplies few rows by every weight, and oneDNN lays a weight out anew for each product: with 32 rows
that takes as long again as the product in float32, and a third of it in bf16.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspo.kernels.amx_nan_guard import whole_tiles
from gspo.kernels.panel_linear_cpu import can_lay_out, laid_out_linear, lay_out
from gspo.models.patching import replaced

SHARE = 0.25  # of the machine's memory: of a model with larger linear layers no second copy is made


@contextmanager
def laid_out_weights(model: nn.Module, rows: int) -> Iterator[dict[nn.Module, Tensor]]:
    """Run a model's linear layers with weights laid out for products of about `rows` rows, without gradients.

    -> layer -> its weight, for layers that the kernel lays out; PyTorch lays out the others where it can.
    On CPUs only. Products are the same to rounding. The weights must not change inside.
    """
    ours, forwards = {}, []
    for m in _linear_layers(model):
        if can_lay_out(m.weight):
            ours[m] = lay_out(m.weight)
            forwards.append((m, "forward", functools.partial(laid_out_linear, ours[m], m.out_features, m.bias)))
        elif _onednn_works(m.weight.dtype):
            weight = _onednn_lay_out(m.weight, rows)
            forwards.append((m, "forward", functools.partial(_onednn_product, weight, m.bias)))
    with replaced(forwards):
        yield ours


def laid_out_bytes(model: nn.Module) -> int:
    """Return the bytes that the second copies of a model's weights take."""
    return sum(m.weight.nbytes for m in _linear_layers(model) if can_lay_out(m.weight) or _onednn_works(m.weight.dtype))


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the layers to lay out: unsharded ones on the CPU; none of a model that would not fit twice."""
    layers = [m for m in model.modules() if type(m) is nn.Linear and _is_plain(m.weight)]
    size = sum(m.weight.nbytes for m in layers)
    return [] if size > SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") else layers


def _is_plain(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and not hasattr(weight, "device_mesh")


# ---- PyTorch's own operators for it, which it keeps for its compiler ----


@torch.no_grad()
def _onednn_lay_out(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _onednn_product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(whole_tiles(x), weight, bias, "none", [], "")


@functools.lru_cache
@torch.no_grad()
def _onednn_works(dtype: torch.dtype) -> bool:
    """Tell by a trial whether these operators exist in this PyTorch, and multiply."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=g).to(dtype) for shape in ((2, 3, 40), (24, 40), (24,)))
    try:
        found = _onednn_product(_onednn_lay_out(weight, 6), bias, x)
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(found.float(), F.linear(x, weight, bias).float(), rtol=0.02, atol=0.05)

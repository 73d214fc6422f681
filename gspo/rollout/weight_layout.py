"""Linear layers with their weights laid out as the CPU's matrix products want them, while a sampler generates.

A step of decoding multiplies few rows by every weight, and oneDNN lays a weight out anew for each product: with 32 rows
that takes as long again as the product in float32, and a third of it in bf16. Here it is done once a rollout.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspo.kernels.linear import can_lay_out, lay_out, product
from gspo.kernels.whole_tiles import whole_tiles

SHARE = 0.25  # of the machine's memory: models whose linear layers are larger keep one copy of them


@contextmanager
def prepared(model: nn.Module, rows: int) -> Iterator[dict[nn.Module, Tensor]]:
    """The model's linear layers prepared for products of about `rows` rows, for the forwards inside, without gradients.
    -> those laid out by kernels/linear.py.

    On CPUs only, and where PyTorch has what it takes. The products are the same to rounding. Weights must not change
    inside.
    """
    layers, laid_out = _prepared(model), {}
    try:
        for m in layers:
            if can_lay_out(m.weight):
                laid_out[m] = lay_out(m.weight)
                m.forward = functools.partial(product, laid_out[m], m.out_features, m.bias)
            elif _works(m.weight.dtype):
                m.forward = functools.partial(_product, _lay_out(m.weight, rows), m.bias)
        yield laid_out
    finally:
        for m in layers:
            m.__dict__.pop("forward", None)


def _prepared(model: nn.Module) -> list[nn.Linear]:
    layers = [m for m in model.modules() if type(m) is nn.Linear and _plain(m.weight)]
    size = sum(m.weight.nbytes for m in layers)
    return [] if size > SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") else layers


def prepared_bytes(model: nn.Module) -> int:
    """What the copies of a model's weights take."""
    return sum(m.weight.nbytes for m in _prepared(model) if can_lay_out(m.weight) or _works(m.weight.dtype))


def _plain(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and not hasattr(weight, "device_mesh")


@torch.no_grad()
def _lay_out(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(whole_tiles(x), weight, bias, "none", [], "")


@functools.lru_cache
@torch.no_grad()
def _works(dtype: torch.dtype) -> bool:
    """Whether these operators, which PyTorch keeps for its compiler, exist here and multiply: found out by a trial."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=g).to(dtype) for shape in ((2, 3, 40), (24, 40), (24,)))
    try:
        found = _product(_lay_out(weight, 6), bias, x)
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(found.float(), F.linear(x, weight, bias).float(), rtol=0.02, atol=0.05)

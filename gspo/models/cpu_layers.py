"""Compute a model's RMSNorms, gated MLPs and rotary embeddings by compiled CPU kernels.

Which modules these kernels serve is found by trial, not by name: each module is run on random numbers and compared
with the kernel's formula. Only forwards of ours use the kernels (`compiled_layers_enabled`, entered by
attention_support.attention_implementation); called by anyone else, the model runs transformers' code.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspo.kernels.native import cpu_kernels_take, library
from gspo.kernels.norm_gate_rotary_cpu import rms_norm, rotate, silu_product
from gspo.models.patching import replace

ROTARY = "apply_rotary_pos_emb"
_forwards_of_ours = 0  # under way now


@contextmanager
def compiled_layers_enabled() -> Iterator[None]:
    """Use the kernels in the forwards inside, for models that went through `install_compiled_layers`."""
    global _forwards_of_ours
    _forwards_of_ours += 1
    try:
        yield
    finally:
        _forwards_of_ours -= 1


def install_compiled_layers(model: nn.Module) -> nn.Module:
    """Give a model's layers a second way to run, by compiled kernels, and return the model.

    They take it while `compiled_layers_enabled`, for tensors that the kernels serve. Without a compiled library
    nothing changes.
    """
    if library() is None:
        return model
    for m in model.modules():
        if (offset := norm_offset(m)) is not None:
            replace(m, "forward", partial(_norm, m, norm_eps(m), offset))
        elif is_gated_mlp(m):
            replace(m, "forward", partial(_gated_mlp, m))
    for name in {type(m).__module__ for m in model.modules()}:
        _install_rotary(sys.modules[name])
    return model


def _norm(m: nn.Module, eps: float, offset: float, x: Tensor) -> Tensor:
    if not _forwards_of_ours or x.dtype != m.weight.dtype or not cpu_kernels_take(x, m.weight):
        return type(m).forward(m, x)
    return rms_norm(x, m.weight, eps, offset)


def _gated_mlp(m: nn.Module, x: Tensor) -> Tensor:
    if not _forwards_of_ours or x.device.type != "cpu":
        return type(m).forward(m, x)
    gate, up = m.gate_proj(x), m.up_proj(x)
    return m.down_proj(silu_product(gate, up) if cpu_kernels_take(gate, up) else m.act_fn(gate) * up)


def _rotary(plain: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
    fits = not args and not kwargs and q.ndim == 4 and cos.ndim == 3 and q.shape[-1] == k.shape[-1] == cos.shape[-1]
    if not _forwards_of_ours or not fits or cos.requires_grad or not cpu_kernels_take(q, k, cos, sin):
        return plain(q, k, cos, sin, *args, **kwargs)
    return rotate(q, cos, sin), rotate(k, cos, sin)


# ---- trials ----


def norm_eps(m: nn.Module) -> float | None:
    """Return a norm's epsilon, by either of the names that transformers has for it."""
    return getattr(m, "variance_epsilon", getattr(m, "eps", None))


@torch.no_grad()
def norm_offset(m: nn.Module) -> float | None:
    """Return what an RMSNorm adds to its weight, 0 or 1; None if the module is no RMSNorm."""
    eps = norm_eps(m)
    if not isinstance(eps, float) or set(m._parameters) != {"weight"} or m._modules:
        return None
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, generator=g) * torch.tensor([[1e-4, 1e-3, 1e-2, 1.0, 10.0, 100.0]]).T  # eps counts, too
    weight = torch.randn(8, generator=g)
    trial = copy.copy(m)
    trial.__dict__["_parameters"] = {"weight": nn.Parameter(weight)}
    found = _try(type(m).forward, trial, x)
    for offset in (0.0, 1.0):
        if found is not None and _same(found, F.rms_norm(x, (8,), weight + offset, eps)):
            return offset
    return None


@torch.no_grad()
def is_gated_mlp(m: nn.Module) -> bool:
    """Tell whether the module is down(silu(gate(x)) * up(x)), by a trial with small layers in place of its own."""
    if not {"gate_proj", "up_proj", "down_proj"} <= set(m._modules):
        return False
    trial = copy.copy(m)
    small = {"gate_proj": nn.Linear(4, 6), "up_proj": nn.Linear(4, 6), "down_proj": nn.Linear(6, 4)}
    trial.__dict__["_modules"] = m._modules | small
    x = torch.linspace(-9.0, 9.0, 12).view(3, 4)
    found = _try(type(m).forward, trial, x)
    wanted = small["down_proj"](F.silu(small["gate_proj"](x)) * small["up_proj"](x))
    return found is not None and _same(found, wanted)


@torch.no_grad()
def _install_rotary(module: ModuleType) -> None:
    """Replace a modelling file's function that rotates queries and keys, if it rotates halves as the kernel does."""
    plain = getattr(module, ROTARY, None)
    if plain is None or isinstance(plain, partial):
        return
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=g) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, 8, generator=g) for _ in range(2))
    found = _try(plain, q, k, cos, sin)
    wanted = [x * cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin[:, None] for x in (q, k)]
    if isinstance(found, tuple) and len(found) == 2 and all(map(_same, found, wanted)):
        replace(module, ROTARY, partial(_rotary, plain))


def _try(function: Callable, *args: Any) -> Any:
    try:
        return function(*args)
    except Exception:  # another signature or shape: not a module that the kernels serve
        return None


def _same(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)

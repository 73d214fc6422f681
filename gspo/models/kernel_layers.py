"""Compute a model's RMSNorms, gated MLPs and rotary embeddings by kernels: compiled ones on a CPU, Triton's on CUDA.

Which modules these kernels serve is found by trial, not by name: each module is run on random numbers and compared
with the kernel's formula. Only forwards of ours use the kernels (`layer_kernels_enabled`, entered by
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

from gspo.kernels.norm_gate_rotary import add_rms_norm, kernels_take, rms_norm, rotate, silu_product
from gspo.kernels.training_choice_cpu import kernel_wins
from gspo.models.patching import replace

ROTARY = "apply_rotary_pos_emb"
PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")  # of a decoder layer
PASSED_ON = ("attention_mask", "position_ids", "past_key_values", "position_embeddings", "pack", "slots")
SUMS_ON = {"cuda"}  # devices on which a layer's first sum and second norm are computed together
_forwards_of_ours = 0  # under way now


@contextmanager
def layer_kernels_enabled() -> Iterator[None]:
    """Use the kernels in the forwards inside, for models that went through `install_layer_kernels`."""
    global _forwards_of_ours
    _forwards_of_ours += 1
    try:
        yield
    finally:
        _forwards_of_ours -= 1


def install_layer_kernels(model: nn.Module) -> nn.Module:
    """Give a model's layers a second way to run, by kernels, and return the model.

    They take it while `layer_kernels_enabled`, for tensors that the kernels serve.
    """
    for name, m in model.named_modules():
        if (offset := norm_offset(m)) is not None:
            in_layer = any(part.isdigit() for part in name.split("."))  # not the last norm, which feeds the head
            replace(m, "forward", partial(_norm, m, norm_eps(m), offset, norm_widens(m), in_layer))
        elif is_gated_mlp(m):
            replace(m, "forward", partial(_gated_mlp, m))
        elif is_residual_layer(m) and (offset := norm_offset(norm := m.post_attention_layernorm)) is not None:
            replace(m, "forward", partial(_residual_layer, m, norm_eps(norm), offset, norm_widens(norm)))
    for name in {type(m).__module__ for m in model.modules()}:
        _install_rotary(sys.modules[name])
    return model


def _served(operation: str, *tensors: Tensor) -> bool:
    """Return whether there are kernels for these tensors; on a CPU, whether they were found to be the faster."""
    return kernels_take(*tensors) and (tensors[0].device.type != "cpu" or kernel_wins(operation, tensors[0].dtype))


def _norm(m: nn.Module, eps: float, offset: float, widens: bool, in_layer: bool, x: Tensor) -> Tensor:
    """Compute a norm. In layers of a model under autocast results have the dtype to which the next matrix product would
    round them: one tensor for all that follow, where autocast makes a copy for each."""
    if (
        not _forwards_of_ours
        or (x.device.type == "cpu" and x.dtype != m.weight.dtype)
        or not _served("norm", x, m.weight)
    ):
        return type(m).forward(m, x)
    return rms_norm(x, m.weight, eps, offset, _norm_dtype(x.dtype, m.weight, widens, in_layer))


def _norm_dtype(given: torch.dtype, weight: Tensor, widens: bool, autocast: bool) -> torch.dtype:
    """Return the dtype of a norm's result for an input's: its class's own; autocast's where that is on, and counts."""
    if autocast and torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return torch.promote_types(given, weight.dtype) if widens else given


def _residual_layer(
    m: nn.Module, eps: float, offset: float, widens: bool, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Compute a decoder layer, its first sum and its second norm together."""
    x, weight = hidden_states, m.post_attention_layernorm.weight
    if not _forwards_of_ours or args or x.device.type not in SUMS_ON or not kernels_take(x, weight):
        return type(m).forward(m, x, *args, **kwargs)
    branch, _ = m.self_attn(hidden_states=m.input_layernorm(x), **kwargs)
    if kernels_take(branch):
        dtype = _norm_dtype(torch.promote_types(x.dtype, branch.dtype), weight, widens, True)
        x, n = add_rms_norm(x, branch, weight, eps, offset, dtype)
    else:
        n = m.post_attention_layernorm(x := x + branch)
    return x + m.mlp(n)


def _gated_mlp(m: nn.Module, x: Tensor) -> Tensor:
    if not _forwards_of_ours:
        return type(m).forward(m, x)
    gate, up = m.gate_proj(x), m.up_proj(x)
    return m.down_proj(silu_product(gate, up) if _served("gate", gate, up) else m.act_fn(gate) * up)


def _rotary(plain: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
    fits = not args and not kwargs and q.ndim == 4 and cos.ndim == 3 and q.shape[-1] == k.shape[-1] == cos.shape[-1]
    fits = fits and q.dtype == k.dtype and not cos.requires_grad
    if not _forwards_of_ours or not fits or not _served("rotary", q, k, cos, sin):
        return plain(q, k, cos, sin, *args, **kwargs)
    return rotate(q, k, cos, sin)


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
def norm_widens(m: nn.Module) -> bool:
    """Tell whether a norm in float32 makes float32 of half precision, as its weight multiplies what was rounded."""
    trial = copy.copy(m)
    trial.__dict__["_parameters"] = {"weight": nn.Parameter(torch.ones(8))}
    found = _try(type(m).forward, trial, torch.ones(2, 8, dtype=torch.bfloat16))
    return isinstance(found, Tensor) and found.dtype == torch.float32


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


class _Stub(nn.Module):
    """Stand for a part of a layer in its trial."""

    def __init__(self, function: Callable):
        super().__init__()
        self.forward = function


@torch.no_grad()
def is_residual_layer(m: nn.Module) -> bool:
    """Tell whether the module is y + mlp(norm(y)), where y = x + attention(norm(x)), by a trial with other functions in
    place of its parts. All that it is given beside x must go to its attention."""
    if set(m._modules) != set(PARTS) or m._parameters:
        return False
    passed_on: dict[str, Any] = {}

    def attention(*, hidden_states: Tensor, **given: Any) -> tuple[Tensor, None]:
        passed_on.update(given)
        return hidden_states.square(), None

    functions = (lambda x: 2 * x + 1, attention, lambda x: 3 * x - 1, torch.cos)
    trial = copy.copy(m)
    trial.__dict__["_modules"] = dict(zip(PARTS, map(_Stub, functions), strict=True))
    x, given = torch.linspace(-1.0, 1.0, 12).view(1, 3, 4), {name: object() for name in PASSED_ON}
    found = _try(partial(type(m).forward, trial, **given), x)
    y = x + (2 * x + 1).square()
    return passed_on.items() >= given.items() and found is not None and _same(found, y + torch.cos(3 * y - 1))


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

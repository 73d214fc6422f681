"""Compute RMSNorm, the gated activation and rotary positions, each in one pass over memory.

PyTorch makes five to ten passes for each, and in training keeps the intermediate results. Here a backward pass has the
inputs, and computes the rest again. Sums are float32, and results are rounded once. All are differentiable, by the
functions of `norm_gate_rotary_triton.py` (CUDA), `norm_gate_rotary_cpu.py` (C++) or `plain_norm_gate_rotary.py`.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gspo.kernels import norm_gate_rotary_cpu, plain_norm_gate_rotary
from gspo.kernels.dispatch import Implementation, always, choose, on_cuda, triton_kernel
from gspo.kernels.native import cpu_kernels_take


def _on_cuda(*tensors: Tensor) -> bool:
    return all(on_cuda(x) and not hasattr(x, "device_mesh") for x in tensors)


IMPLEMENTATIONS = (
    Implementation(_on_cuda, triton_kernel("norm_gate_rotary_triton")),
    Implementation(cpu_kernels_take, lambda *tensors: norm_gate_rotary_cpu),
    Implementation(always, lambda *tensors: plain_norm_gate_rotary),
)


def kernels_take(*tensors: Tensor) -> bool:
    """Return whether there are kernels for these tensors, beside plain PyTorch."""
    return _kernels(*tensors) is not plain_norm_gate_rotary


def _kernels(*tensors: Tensor) -> ModuleType:
    return choose(IMPLEMENTATIONS, *tensors)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * (weight + offset) for x [..., D], weight [D], in x's dtype or `dtype`."""
    return _Norm.apply(x, weight, eps, offset, dtype or x.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype) -> Tensor:
        y, scale = _kernels(x, weight).norm(x, weight, eps, offset, dtype)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        dx, dweight = _kernels(x, weight).norm_back(dy, x, weight, ctx.offset, scale)
        return dx, dweight.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None, None, None, None


def add_rms_norm(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return (s, rms_norm(s)) for s = x + branch, all [..., D]; s has the dtype that PyTorch's sum has."""
    return _AddNorm.apply(x, branch, weight, eps, offset, dtype or x.dtype)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        total, y, scale = _kernels(x, branch, weight).add_norm(x, branch, weight, eps, offset, dtype)
        ctx.save_for_backward(total, weight, scale)
        ctx.offset, ctx.dtypes = offset, (x.dtype, branch.dtype)
        return total, y

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        kernels = _kernels(total, weight)
        dx, dbranch, dweight = kernels.add_norm_back(dtotal, dy, total, weight, ctx.offset, scale, *ctx.dtypes)
        dweight = dweight.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return dx, dbranch, dweight, None, None, None


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, all of one shape and dtype."""
    return _Silu.apply(gate, up)


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _kernels(gate, up).silu(gate, up)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return _kernels(gate, up).silu_back(dout, gate, up)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return x * cos + [-x2, x1] * sin for x = [x1, x2], each of q [B, H, T, D] and k [B, Hk, T, D] of one dtype.

    cos, sin [B or 1, T, D] have no gradients. Results have the wider dtype of the two; under autocast they have q's, to
    which attention would round.
    """
    dtype = q.dtype if torch.is_autocast_enabled(q.device.type) else torch.promote_types(q.dtype, cos.dtype)
    return _Rotate.apply(q, k, cos.contiguous(), sin.contiguous(), dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = q.dtype
        return _kernels(q, k, cos, sin).rotate(q, k, cos, sin, dtype, back=False)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_kernels(dq, dk, cos, sin).rotate(dq, dk, cos, sin, ctx.dtype, back=True), None, None, None

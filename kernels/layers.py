"""RMSNorm, gated activation and rotary positions for CPUs: each one pass over memory in compiled code (cpu/layers.cpp).

PyTorch makes five to ten passes of them, and in training keeps what lies between. Sums are float32, and results are
rounded once. For tensors that `gspo.kernels.native.takes`; with gradients, as any operator.
"""

from typing import Any

import torch
from torch import Tensor

from gspo.kernels.native import call, numbers


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset), x [..., D], weight [D], in x's dtype or `dtype`."""
    return _Norm.apply(x.contiguous(), weight, eps, offset, dtype or x.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype) -> Tensor:
        width = x.shape[-1]
        y, scale = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
        call("gspo_norm", _half(x), _half(weight), _half(y), x, weight, offset, eps, y, scale, scale.numel(), width)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        dy, width = dy.contiguous(), x.shape[-1]
        dx, dweight = torch.empty_like(x), scale.new_zeros(torch.get_num_threads(), width)
        kinds = _half(x), _half(weight), _half(dy)
        call("gspo_norm_back", *kinds, dy, x, weight, ctx.offset, scale, dx, dweight, scale.numel(), width)
        return dx, dweight.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None, None, None, None


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all of one shape and dtype."""
    return _Silu.apply(gate.contiguous(), up.contiguous())


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty_like(gate)
        call("gspo_silu", _half(gate), gate, up, out, gate.numel())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        call("gspo_silu_back", _half(gate), dout.contiguous(), gate, up, dgate, dup, gate.numel())
        return dgate, dup


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x * cos + [-x2, x1] * sin for x = [x1, x2] [B, H, T, D], cos, sin [B or 1, T, D], both of which
    take no gradient -> [B, H, T, D] in the wider dtype; in x's under autocast, where attention would round it."""
    dtype = x.dtype if torch.is_autocast_enabled("cpu") else torch.promote_types(x.dtype, cos.dtype)
    return _Rotate.apply(x, cos.contiguous(), sin.contiguous(), dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotated(x, cos, sin, dtype, back=False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _rotated(dy, *ctx.saved_tensors, ctx.dtype, back=True), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, back: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, tokens, width = x.shape
    y = x.new_empty(batch, tokens, heads, width, dtype=dtype)
    per_batch = cos.stride(0) if len(cos) > 1 else 0
    call(
        "gspo_rotate",
        *(_half(x), _half(cos), _half(y), x, numbers(x.stride()[:3]), cos, sin, per_batch, y),
        *(batch, heads, tokens, width, int(back)),
    )
    return y.transpose(1, 2)


def _half(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)

"""Compute RMSNorm, the gated activation and rotary positions on a CPU, each in one pass over memory.

PyTorch makes five to ten passes for each, and in training keeps the intermediate results. Sums are float32, and results
are rounded once. All are differentiable, and take tensors for which `native.cpu_kernels_take` is true.
"""

from typing import Any

import torch
from torch import Tensor

from gspo.kernels.native import call, is_bf16, size_array


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * (weight + offset) for x [..., D], weight [D], in x's dtype or `dtype`."""
    return _Norm.apply(x.contiguous(), weight, eps, offset, dtype or x.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype) -> Tensor:
        width = x.shape[-1]
        y, scale = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
        call(
            "gspo_norm", x_bf16=is_bf16(x), weight_bf16=is_bf16(weight), y_bf16=is_bf16(y), x=x, weight=weight,
            offset=offset, eps=eps, y=y, scale=scale, rows=scale.numel(), width=width,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        dy, width = dy.contiguous(), x.shape[-1]
        dx, dweight = torch.empty_like(x), scale.new_zeros(torch.get_num_threads(), width)
        call(
            "gspo_norm_back", x_bf16=is_bf16(x), weight_bf16=is_bf16(weight), y_bf16=is_bf16(dy), dy=dy, x=x,
            weight=weight, offset=ctx.offset, scale=scale, dx=dx, dweight=dweight, rows=scale.numel(), width=width,
        )  # fmt: skip
        return dx, dweight.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None, None, None, None


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, all of one shape and dtype."""
    return _Silu.apply(gate.contiguous(), up.contiguous())


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty_like(gate)
        call("gspo_silu", bf16=is_bf16(gate), gate=gate, up=up, out=out, count=gate.numel())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        call(
            "gspo_silu_back", bf16=is_bf16(gate), dout=dout.contiguous(), gate=gate, up=up, dgate=dgate, dup=dup,
            count=gate.numel(),
        )  # fmt: skip
        return dgate, dup


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x * cos + [-x2, x1] * sin for x = [x1, x2] [B, H, T, D], cos, sin [B or 1, T, D] without gradients.

    The result [B, H, T, D] has the wider dtype of the two; under autocast it has x's, to which attention would round.
    """
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
    call(
        "gspo_rotate", x_bf16=is_bf16(x), cos_bf16=is_bf16(cos), y_bf16=is_bf16(y), x=x,
        strides=size_array(*x.stride()[:3]), cos=cos, sin=sin, cos_stride=cos.stride(0) if len(cos) > 1 else 0, y=y,
        batch=batch, heads=heads, tokens=tokens, width=width, back=back,
    )  # fmt: skip
    return y.transpose(1, 2)

"""Compute the functions of `norm_gate_rotary.py` by compiled code (cpu/norm_gate_rotary.cpp), on a CPU.

They take tensors for which `native.cpu_kernels_take` is true, and mean what those of `plain_norm_gate_rotary.py` do.
"""

import torch
from torch import Tensor

from gspo.kernels.native import call, is_bf16, size_array


def norm(x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return y [..., D] in `dtype` and 1 / sqrt(mean(x^2) + eps) [...]."""
    x = x.contiguous()
    y, scale = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
    call(
        "gspo_norm", x_bf16=is_bf16(x), weight_bf16=is_bf16(weight), y_bf16=is_bf16(y), x=x, weight=weight,
        offset=offset, eps=eps, y=y, scale=scale, rows=scale.numel(), width=x.shape[-1],
    )  # fmt: skip
    return y, scale


def norm_back(dy: Tensor, x: Tensor, weight: Tensor, offset: float, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients (dx, dweight [threads, D])."""
    dy, x, width = dy.contiguous(), x.contiguous(), x.shape[-1]
    dx, dweight = torch.empty_like(x), scale.new_zeros(torch.get_num_threads(), width)
    call(
        "gspo_norm_back", x_bf16=is_bf16(x), weight_bf16=is_bf16(weight), y_bf16=is_bf16(dy), dy=dy, x=x,
        weight=weight, offset=offset, scale=scale, dx=dx, dweight=dweight, rows=scale.numel(), width=width,
    )  # fmt: skip
    return dx, dweight


def add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x + branch, its norm in `dtype`, and the norm's scale."""
    total = x + branch
    return total, *norm(total, weight, eps, offset, dtype)


def add_norm_back(
    dtotal: Tensor, dy: Tensor, total: Tensor, weight: Tensor, offset: float, scale: Tensor,
    x_dtype: torch.dtype, branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients (dx, dbranch, dweight [threads, D])."""
    dx, dweight = norm_back(dy, total, weight, offset, scale)
    dx += dtotal
    return dx.to(x_dtype), dx.to(branch_dtype), dweight


def silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    call("gspo_silu", bf16=is_bf16(gate), gate=gate, up=up, out=out, count=gate.numel())
    return out


def silu_back(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients (dgate, dup)."""
    gate, up = gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    call(
        "gspo_silu_back", bf16=is_bf16(gate), dout=dout.contiguous(), gate=gate, up=up, dgate=dgate, dup=dup,
        count=gate.numel(),
    )  # fmt: skip
    return dgate, dup


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, back: bool) -> tuple[Tensor, Tensor]:
    """Return q and k rotated, in `dtype`; `back`: by the transposed map."""
    return tuple(_rotated(x, cos, sin, dtype, back) for x in (q, k))


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

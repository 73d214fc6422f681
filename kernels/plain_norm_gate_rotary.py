"""Compute the functions of `norm_gate_rotary.py` in plain PyTorch: the formulas that its kernels are compared with.

Sums are float32, or float64 for float64. A gradient of a norm's weight comes in parts [P, D], still to be added.
"""

import torch
from torch import Tensor


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def norm(x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return y [..., D] in `dtype` and 1 / sqrt(mean(x^2) + eps) [...]."""
    wide, w = _wide(x, weight)
    scale = (wide.square().mean(-1) + eps).rsqrt()
    return (wide * scale[..., None] * (w + offset)).to(dtype), scale


def norm_back(dy: Tensor, x: Tensor, weight: Tensor, offset: float, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients (dx, dweight [1, D])."""
    grad, wide, w = _wide(dy, x, weight)
    n, weighted = wide * scale[..., None], grad * (w + offset)
    dx = (weighted - n * (weighted * n).mean(-1, keepdim=True)) * scale[..., None]
    return dx.to(x.dtype), (grad * n).flatten(0, -2).sum(0, keepdim=True)


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
    """Return the gradients (dx, dbranch, dweight [1, D])."""
    dx, dweight = norm_back(dy, _wide(total)[0], weight, offset, scale)
    dx = dx + dtotal
    return dx.to(x_dtype), dx.to(branch_dtype), dweight


def silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    a, b = _wide(gate, up)
    return (torch.nn.functional.silu(a) * b).to(gate.dtype)


def silu_back(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients (dgate, dup)."""
    d, a, b = _wide(dout, gate, up)
    s = torch.sigmoid(a)
    return (d * b * s * (1 + a * (1 - s))).to(gate.dtype), (d * a * s).to(up.dtype)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, back: bool) -> tuple[Tensor, Tensor]:
    """Return q and k rotated, in `dtype`; `back`: by the transposed map."""
    c, s = (x[:, None] for x in _wide(cos, sin))

    def turned(x: Tensor) -> Tensor:
        (wide,) = _wide(x)
        low, high = (wide * s if back else wide).chunk(2, -1)
        half = torch.cat([high, -low], -1) if back else torch.cat([-high, low], -1) * s
        # [B, T, H, D] in memory, as attention reads it
        return (wide * c + half).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)

    return turned(q), turned(k)

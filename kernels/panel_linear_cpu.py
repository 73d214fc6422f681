"""Multiply few rows by a linear layer's weight on a CPU, from a copy in panels that is laid out once.

In bfloat16 on two Zen 4 cores, timed by hand, the layers of SmolLM2-135M take 43 ms for 64 rows and 23 for 32; with
oneDNN's own layout 48 and 29.
"""

import torch
from torch import Tensor

from gspo.kernels.native import call, cpu_kernels_take, is_bf16

PANEL = 48  # outputs whose weights are stored together


def can_lay_out(weight: Tensor) -> bool:
    """Return whether `laid_out_linear` takes this weight [N, K]: float32, or bfloat16 that comes in pairs."""
    return cpu_kernels_take(weight) and (weight.dtype == torch.float32 or weight.shape[1] % 2 == 0)


def lay_out(weight: Tensor) -> Tensor:
    """Copy a weight [N, K] to panels [N / 48, K, 48], in bfloat16 [N / 48, K / 2, 48, 2]; zeros pad the last one."""
    n, k = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    weight = weight.detach().contiguous()
    laid_out = weight.new_empty(-(-n // PANEL), k // pair, PANEL, pair)
    call("gspo_lay_out", weight=weight, laid_out=laid_out, outputs=n, inputs=k // pair)
    return laid_out


def laid_out_linear(laid_out: Tensor, outputs: int, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return x [..., K] times a weight of `lay_out`, plus bias: [..., N] with N = `outputs`, sums in float32."""
    assert x.dtype == laid_out.dtype
    x = x.contiguous()
    width = x.shape[-1]
    y = x.new_empty(*x.shape[:-1], outputs)
    call(
        "gspo_linear", bf16=is_bf16(x), x=x, laid_out=laid_out, bias=bias, y=y, rows=x.numel() // width,
        outputs=outputs, inputs=width,
    )  # fmt: skip
    return y

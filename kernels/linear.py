"""Linear layers in bfloat16 for few rows, with their weights laid out once (cpu/linear.cpp).

Timed by hand on two Zen 4 cores, the layers of SmolLM2-135M take 43 ms for 64 rows and 23 for 32, and with oneDNN's own
layout 48 and 29.
"""

import ctypes

import torch
from torch import Tensor

from gspo.kernels.native import call, library, takes

PANEL = 48  # outputs whose weights lie together


def can_lay_out(weight: Tensor) -> bool:
    """Whether there is compiled code for this weight [N, K]: in float32, or in bfloat16 with a processor's help."""
    if not takes(weight):
        return False
    pairs = ctypes.c_int.in_dll(library(), "gspo_has_pairs").value
    return weight.dtype == torch.float32 or (bool(pairs) and weight.shape[1] % 2 == 0)


def lay_out(weight: Tensor) -> Tensor:
    """[N, K] -> [N / 48, K, 48], in bfloat16 [N / 48, K / 2, 48, 2]; zeros behind the last output."""
    n, k = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    weight = weight.detach().contiguous()
    laid_out = weight.new_empty(-(-n // PANEL), k // pair, PANEL, pair)
    call("gspo_lay_out", weight, laid_out, n, k // pair)
    return laid_out


def product(laid_out: Tensor, outputs: int, bias: Tensor | None, x: Tensor) -> Tensor:
    """x [..., K] by the N = `outputs` weights of `lay_out` -> [..., N], sums in float32."""
    assert x.dtype == laid_out.dtype
    x = x.contiguous()
    width = x.shape[-1]
    y = x.new_empty(*x.shape[:-1], outputs)
    call("gspo_linear", int(x.dtype == torch.bfloat16), x, laid_out, bias, y, x.numel() // width, outputs, width)
    return y

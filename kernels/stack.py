"""A new token a slot through all decoder layers in one call of compiled code (cpu/stack.cpp), for layers of this kind:

    x = x + o(attend(turn(norm(q(n))), turn(norm(k(n))), v(n)))   with n = rms_norm(x), if the layer has q and k norms
    x = x + down(silu(gate(n)) * up(n))                           with n = rms_norm(x)

Between layers x is float32; what products read is in the weights' dtype. Attention is decode_cpu.py's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gspo.kernels.decode_cpu import Sequences
from gspo.kernels.native import call, numbers, pointers


class LayerWeights(NamedTuple):
    """Matrices as `linear.lay_out` makes them; vectors in float32, norms with what their class adds to them."""

    norm: Tensor  # [K]
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    o_bias: Tensor | None
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None
    mlp_norm: Tensor  # [K]
    gate: Tensor
    up: Tensor
    down: Tensor


class Sizes(NamedTuple):
    heads: int
    kv_heads: int
    width: int  # of a query and a key
    value_width: int
    hidden: int
    between: int  # outputs of the gate


class LayerPages(NamedTuple):
    """Where a layer keeps keys [n, Hk, page, D] and values [n, Hk, page, Dv]: of prompts, of answers."""

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


class Stack:
    """Layers with their weights and pages."""

    def __init__(self, layers: list[LayerWeights], pages: list[LayerPages], sizes: Sizes, scale: float, eps: float):
        assert len({x.dtype for x in (*pages[0], layers[0].q)}) == 1
        self.layers, self.pages, self.sizes, self.scale, self.eps = layers, pages, sizes, scale, eps
        self._pointers = pointers(*(x for pair in zip(layers, pages, strict=True) for part in pair for x in part))

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, sequences: tuple[Sequences, Sequences], page: Tensor, offset: Tensor
    ) -> Tensor:
        """x [S, 1, K], cos, sin [S, 1, D] -> [S, 1, K]; keys and values go to `offset` [S] of the answers' pages `page`
        [S] (int64). `sequences`: of the prompts, of the answers."""
        out = x.float().clone(memory_format=torch.contiguous_format)
        prompt_page, answer_page = self.pages[0].prompt_keys.shape[2], self.pages[0].keys.shape[2]
        counts = (len(s.sizes) for s in sequences)
        call(
            "gspo_stack",
            int(self.pages[0].keys.dtype == torch.bfloat16),
            self._pointers,
            numbers([len(self.layers), len(x), *self.sizes, prompt_page, answer_page, *counts]),
            pointers(*sequences[0], *sequences[1]),
            page,
            offset,
            cos.float().contiguous(),
            sin.float().contiguous(),
            out,
            self.scale,
            self.eps,
        )
        return out.to(x.dtype)

"""Run one new token per slot through all decoder layers in one call of compiled code.

For layers that compute

    x = x + o(attend(rotate(norm(q(n))), rotate(norm(k(n))), v(n)))   where n = rms_norm(x)
    x = x + down(silu(gate(n)) * up(n))                               where n = rms_norm(x)

in which the norms of q and k are optional. Between layers x is float32; operands of matrix products are in the weights'
dtype. The attention is that of decode_attention_cpu.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gspo.kernels.decode_attention_cpu import Sequences
from gspo.kernels.native import call, is_bf16, size_array, tensor_array


class LayerWeights(NamedTuple):
    """Matrices as `linear.lay_out` makes them; vectors in float32, norms with the offset that their class adds."""

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
    """The sizes of every layer."""

    heads: int
    kv_heads: int
    width: int  # of a query and a key
    value_width: int
    hidden: int
    between: int  # the MLP's: outputs of the gate


class LayerPages(NamedTuple):
    """A layer's pages of keys [n, Hk, page, D] and of values [n, Hk, page, Dv]: of prompts, of answers."""

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


class Stack:
    """Layers with their weights and pages."""

    def __init__(self, layers: list[LayerWeights], pages: list[LayerPages], sizes: Sizes, scale: float, eps: float):
        assert len({x.dtype for x in (*pages[0], layers[0].q)}) == 1
        self.layers, self.pages, self.sizes, self.scale, self.eps = layers, pages, sizes, scale, eps
        self._tensors = tensor_array(*(x for pair in zip(layers, pages, strict=True) for part in pair for x in part))

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, sequences: tuple[Sequences, Sequences], page: Tensor, offset: Tensor
    ) -> Tensor:
        """Run x [S, 1, K] with cos, sin [S, 1, D] through the layers and return [S, 1, K].

        Keys and values are written to `offset` [S] of the answers' pages `page` [S] (both int64). `sequences`: those of
        the prompts, those of the answers.
        """
        out = x.float().clone(memory_format=torch.contiguous_format)
        prompt_page, answer_page = self.pages[0].prompt_keys.shape[2], self.pages[0].keys.shape[2]
        counts = (len(s.sizes) for s in sequences)
        call(
            "gspo_stack",
            bf16=is_bf16(self.pages[0].keys),
            layers=self._tensors,
            sizes=size_array(len(self.layers), len(x), *self.sizes, prompt_page, answer_page, *counts),
            sequences=tensor_array(*sequences[0], *sequences[1]),
            page=page,
            offset=offset,
            cos=cos.float().contiguous(),
            sin=sin.float().contiguous(),
            x=out,
            scale=self.scale,
            eps=self.eps,
        )
        return out.to(x.dtype)

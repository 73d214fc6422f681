"""List what each compiled kernel in kernels/cpu/ takes: its arguments in order, each with its type and what it holds.

Sizes: H query heads, Hk key-value heads, D and Dv the widths of a key and of a value, S slots, V vocabulary entries.
Every kernel takes the number of threads after these; `native.call` adds it.
"""

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Kind(NamedTuple):
    """The type of an argument: how C receives it, and which Python values it may be."""

    c_type: type
    fits: Callable[[Any], bool]


def _tensor(*dtypes: torch.dtype) -> Kind:
    return Kind(ctypes.c_void_p, lambda x: isinstance(x, Tensor) and x.dtype in dtypes)


def _array(of: type) -> Kind:
    return Kind(ctypes.c_void_p, lambda x: isinstance(x, ctypes.Array) and x._type_ is of)


VALUES = _tensor(torch.float32, torch.bfloat16)  # numbers of a model, in the dtype that a bf16 argument names
VALUES_OR_NONE = Kind(ctypes.c_void_p, lambda x: x is None or VALUES.fits(x))
FLOAT32 = _tensor(torch.float32)
INT64 = _tensor(torch.int64)
TENSORS = _array(ctypes.c_void_p)  # `native.tensor_array`: addresses, in the order of the C++ struct
SIZES = _array(ctypes.c_int64)  # `native.size_array`
FLAG = Kind(ctypes.c_int, lambda x: type(x) is bool)
INT = Kind(ctypes.c_int, lambda x: type(x) is int)
SIZE = Kind(ctypes.c_int64, lambda x: type(x) is int)
NUMBER = Kind(ctypes.c_float, lambda x: isinstance(x, int | float))

_EPILOGUE = {
    "bf16": FLAG,  # whether raw is bfloat16
    "raw": VALUES,  # [T, w], a chunk of raw products
    "targets": INT64,  # [T]
}
_EPILOGUE_SIZES = {
    "sizes": SIZES,  # T, w, the stride of a row of raw, the chunk's first entry of the vocabulary
    "inner": NUMBER,  # logits are outer * tanh(inner * raw) if capped, else inner * raw
    "outer": NUMBER,
    "capped": FLAG,
}
_NORM_TYPES = {"x_bf16": FLAG, "weight_bf16": FLAG, "y_bf16": FLAG}

SIGNATURES: dict[str, dict[str, Kind]] = {
    # logprob_chunk.cpp: a chunk of logits between two matrix products
    "gspo_statistics": {**_EPILOGUE, "stats": FLOAT32, **_EPILOGUE_SIZES},  # stats [3, T], updated
    "gspo_gradient": {**_EPILOGUE, "rows": FLOAT32, **_EPILOGUE_SIZES},  # rows [3, T]; raw is overwritten
    # norm_gate_rotary.cpp: RMSNorm, gated activation, rotary positions
    "gspo_norm": {
        **_NORM_TYPES,
        "x": VALUES,  # [rows, width]
        "weight": VALUES,  # [width]
        "offset": NUMBER,  # added to the weight
        "eps": NUMBER,
        "y": VALUES,  # [rows, width], written
        "scale": FLOAT32,  # [rows], written: 1 / sqrt(mean(x^2) + eps)
        "rows": SIZE,
        "width": SIZE,
    },
    "gspo_norm_back": {
        **_NORM_TYPES,
        "dy": VALUES,  # [rows, width], of y's type
        "x": VALUES,
        "weight": VALUES,
        "offset": NUMBER,
        "scale": FLOAT32,  # from the forward
        "dx": VALUES,  # [rows, width], written
        "dweight": FLOAT32,  # [threads, width], written: each thread's sum
        "rows": SIZE,
        "width": SIZE,
    },
    "gspo_silu": {
        "bf16": FLAG,
        "gate": VALUES,  # [count]
        "up": VALUES,
        "out": VALUES,  # written
        "count": SIZE,
    },
    "gspo_silu_back": {
        "bf16": FLAG,
        "dout": VALUES,  # [count]
        "gate": VALUES,
        "up": VALUES,
        "dgate": VALUES,  # written
        "dup": VALUES,  # written
        "count": SIZE,
    },
    "gspo_rotate": {
        "x_bf16": FLAG,
        "cos_bf16": FLAG,
        "y_bf16": FLAG,
        "x": VALUES,  # [batch, heads, tokens, width], contiguous in the last dimension
        "strides": SIZES,  # of x's first three dimensions
        "cos": VALUES,  # [batch or 1, tokens, width]
        "sin": VALUES,
        "cos_stride": SIZE,  # of the batch dimension of cos and sin; 0: one for all
        "y": VALUES,  # [batch, tokens, heads, width], written
        "batch": SIZE,
        "heads": SIZE,
        "tokens": SIZE,
        "width": SIZE,
        "back": FLAG,  # rotate backwards: the transposed map
    },
    # panel_linear.cpp: linear layers for few rows
    "gspo_lay_out": {
        "weight": VALUES,  # [outputs, inputs]
        "laid_out": VALUES,  # [panels, inputs, panel's outputs], written
        "outputs": SIZE,
        "inputs": SIZE,  # pairs of inputs for bfloat16
    },
    "gspo_linear": {
        "bf16": FLAG,
        "x": VALUES,  # [rows, inputs]
        "laid_out": VALUES,
        "bias": VALUES_OR_NONE,  # [outputs]
        "y": VALUES,  # [rows, outputs], written
        "rows": SIZE,
        "outputs": SIZE,
        "inputs": SIZE,
    },
    # packed_attention.cpp: causal attention of sequences that share tokens
    "gspo_rows": {
        "bf16": FLAG,
        "sequences": TENSORS,  # `Rows`
        "sizes": SIZES,  # rows._sizes
        "q": VALUES,  # [T, H, D] by strides
        "k": VALUES,  # [T, Hk, D] by strides
        "v": VALUES,  # [T, Hk, Dv] by strides
        "scale": NUMBER,
        "softcap": NUMBER,  # 0: none
        "out": VALUES,  # [T, H, Dv], written
        "top": FLOAT32,  # [T, H, 2], written: the largest score, base 2, and 1 / the sum of weights
    },
    "gspo_rows_back": {
        "bf16": FLAG,
        "sequences": TENSORS,
        "sizes": SIZES,
        "dout": VALUES,  # [T, H, Dv]
        "q": VALUES,
        "k": VALUES,
        "v": VALUES,
        "out": VALUES,  # from the forward
        "top": FLOAT32,
        "scale": NUMBER,
        "softcap": NUMBER,
        "dq": VALUES,  # [T, H, D], written
        "dk": VALUES,  # [T, Hk, D], written
        "dv": VALUES,  # [T, Hk, Dv], written
        "sums": FLOAT32,  # scratch: dk and dv of each thread
        "at_most": INT,  # threads for which there is scratch
    },
    # decode_attention.cpp, decoder_layers.cpp: a new token a slot
    "gspo_decode": {
        "bf16": FLAG,
        "tensors": TENSORS,  # `decode_attention_cpu.decode_step` lists them
        "sizes": SIZES,
        "scale": NUMBER,
        "softcap": NUMBER,  # 0: none
    },
    "gspo_stack": {
        "bf16": FLAG,
        "layers": TENSORS,  # of each layer its `LayerWeights` and `LayerPages`
        "sizes": SIZES,  # `Stack.__call__` lists them
        "sequences": TENSORS,  # `Sequences` of the prompts, of the answers
        "page": INT64,  # [S], the page of each new token among the answers'
        "offset": INT64,  # [S], and its place in that page
        "cos": FLOAT32,  # [S, D]
        "sin": FLOAT32,
        "x": FLOAT32,  # [S, K], the hidden states, overwritten
        "scale": NUMBER,
        "eps": NUMBER,  # of the norms
    },
    # draw_token.cpp: the draw of a token
    "gspo_draw": {
        "bf16": FLAG,
        "logits": VALUES,  # [S, V]
        "sizes": SIZES,  # S, V, the stride of a row
        "keys": INT64,  # [S], of the random numbers
        "positions": INT64,  # [S]
        "inverse": NUMBER,  # 1 / temperature
        "greedy": FLAG,
        "tokens": INT64,  # [S], written
        "logprobs": FLOAT32,  # [S], written
        "entropies": FLOAT32,  # [S], written
    },
}

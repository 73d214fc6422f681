"""Attend over packed sequences, by a function registered with transformers under the name `PACKED`.

Prompts attend causally to themselves; each response attends to its prompt and to itself. For N responses of R tokens to
a prompt of P that costs N R (P + R) scores, not the (P + N R)^2 of one mask over the pack. Half precision on CUDA uses
FlashAttention where there is one (shared_prefix_attention.py), CPUs a kernel of ours
(kernels/packed_attention_cpu.py); everything else gathers padded rows for PyTorch's own attention.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from gspo.kernels.native import has_storage
from gspo.kernels.packed_attention_cpu import NO_ROWS, rows_attention, rows_kernel_takes
from gspo.kernels.segment_attention import backend_for
from gspo.kernels.training_choice_cpu import kernel_wins
from gspo.models.attention_support import check_attention_arguments
from gspo.packing.pack import PackedBatch
from gspo.packing.shared_prefix_attention import shared_prefix_attention

PACKED = "gspo_packed"


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather packed tokens [1, H, T, D] into padded rows [R, H, S, D], by index [R, S]."""
    tokens = x[0].transpose(0, 1)
    return tokens.index_select(0, index.flatten()).view(*index.shape, *tokens.shape[1:]).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Attend with q [R, H, L, D] over k [R, Hk, K, D], v [R, Hk, K, Dv] -> [R, H, L, Dv].

    seen [R or 1, 1, L, K] bool is the mask; None: causal.
    """
    grouped = q.shape[1] != k.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=grouped
        )
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if seen is None:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return weights.to(v.dtype) @ v


def _padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: PackedBatch,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend by padded rows and masks: query [1, H, T, D], key, value [1, Hk, T, D] of a pack -> [1, T, H, D]."""
    width = pack.prompt_index.shape[1]
    local = None
    if window is not None and window < width:
        local = torch.ones(width, width, dtype=torch.bool, device=query.device).tril().triu(1 - window)[None, None]
    q, k, v = (_gather_rows(x, pack.prompt_index) for x in (query, key, value))
    prompts = _attend(q, k, v, local, scale, softcap)
    q = _gather_rows(query, pack.response_index)
    k, v = (_gather_rows(x, pack.sequence_index) for x in (key, value))
    responses = _attend(q, k, v, pack.visible(window), scale, softcap)
    padded = [x.transpose(1, 2).flatten(0, 1) for x in (prompts, responses)]
    return torch.cat(padded).index_select(0, pack.padded_index)[None]


def _cast_alike(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast query, key and value to one dtype; under autocast rotary embeddings leave the first two in float32.

    On CUDA to the dtype that autocast gives PyTorch's own attention. On a CPU to the value's where our kernel serves
    it best, and else to float32: there PyTorch's attention is faster than in bf16, its backward three times, and its
    products read no further than their rows (kernels/amx_nan_guard.py).
    """
    device, value = tensors[0].device.type, tensors[2]
    if device == "cpu":
        served = _kernel_serves(*tensors, dtype=value.dtype)
        dtype = value.dtype if served else torch.promote_types(value.dtype, torch.float32)
        return tuple(x.to(dtype) for x in tensors)
    if torch.is_autocast_enabled(device):
        return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
    return tensors


def _kernel_serves(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether our kernel for CPUs takes tensors, as they are or in `dtype`, and was found to be the faster."""
    return rows_kernel_takes(q, k, v, dtype=dtype) and kernel_wins("attention", dtype or q.dtype)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    pack: PackedBatch | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers calls it: query [1, H, T, D], key, value [1, Hk, T, D] -> [1, T, H, D].

    Raises UserError where the model asks for another kind of attention than this.
    """
    assert attention_mask is None and dropout == 0.0, (
        "transformers builds no mask for us, and a policy stays in eval mode"
    )
    check_attention_arguments(module, pack, options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = options.get("sliding_window") or None
    wanted = value.dtype  # by the projection that follows, where there is no autocast
    query, key, value = _cast_alike((query, key, value))
    tokens = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]  # x[0] would copy its gradient
    backend = backend_for(*tokens, softcap)
    if backend is not None:
        q, k, v = (x.contiguous() for x in tokens)
        return shared_prefix_attention(q, k, v, pack, backend, scale, softcap, window)[None], None
    if _kernel_serves(*tokens):
        rows = pack.rows if has_storage(query) else NO_ROWS
        return rows_attention(*tokens, rows, scale, softcap, window)[None].to(wanted), None
    with torch.autocast(query.device.type, enabled=False):
        return _padded_attention(query, key, value, pack, scale, softcap, window).to(wanted), None


AttentionInterface.register(PACKED, packed_attention)

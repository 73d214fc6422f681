"""Run the two functions of `logprob_chunk.py` on a CPU in compiled code, each in one pass over memory."""

from typing import Any

import torch
from torch import Tensor

from gspo.kernels.logprob_chunk import LogitTransform
from gspo.kernels.native import call, is_bf16, size_array


def add_statistics(raw: Tensor, begin: int, targets: Tensor, stats: Tensor, transform: LogitTransform) -> None:
    """Compute `logprob_chunk.add_statistics`, raw in float32 or bfloat16, stats in float32."""
    assert raw.stride(1) == 1 and stats.is_contiguous() and stats.dtype == torch.float32
    call("gspo_statistics", stats=stats, **_shared(raw, begin, targets, transform))


def to_gradient(raw: Tensor, begin: int, targets: Tensor, rows: Tensor, transform: LogitTransform) -> None:
    """Compute `logprob_chunk.to_gradient`, raw in float32 or bfloat16, rows in float32."""
    assert raw.stride(1) == 1 and rows.is_contiguous() and rows.dtype == torch.float32
    call("gspo_gradient", rows=rows, **_shared(raw, begin, targets, transform))


def _shared(raw: Tensor, begin: int, targets: Tensor, transform: LogitTransform) -> dict[str, Any]:
    """Return the arguments that both kernels take."""
    sizes = size_array(*raw.shape, raw.stride(0), begin)
    return {"bf16": is_bf16(raw), "raw": raw, "targets": targets, "sizes": sizes, **transform._asdict()}

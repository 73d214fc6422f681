"""The two passes of `epilogue.py` for CPUs, in compiled code (cpu/epilogue.cpp): each one pass over memory."""

import torch
from torch import Tensor

from gspo.kernels.epilogue import Shaping
from gspo.kernels.native import call, numbers


def add_statistics(raw: Tensor, begin: int, targets: Tensor, stats: Tensor, shaping: Shaping, entropy: bool) -> None:
    """As `epilogue.add_statistics`; raw in float32 or bfloat16, stats in float32."""
    assert raw.stride(1) == 1 and stats.is_contiguous() and stats.dtype == torch.float32
    call(
        "gspo_statistics", _half(raw), raw, targets, stats, _sizes(raw, begin), *shaping[:2], *_flags(shaping, entropy)
    )


def to_gradient(raw: Tensor, begin: int, targets: Tensor, rows: Tensor, shaping: Shaping) -> None:
    """As `epilogue.to_gradient`; raw in float32 or bfloat16, rows in float32."""
    assert raw.stride(1) == 1 and rows.is_contiguous() and rows.dtype == torch.float32
    flags = _flags(shaping, entropy=len(rows) == 5)
    call("gspo_gradient", _half(raw), raw, targets, rows, _sizes(raw, begin), *shaping[:2], *flags)


def _half(raw: Tensor) -> int:
    return int(raw.dtype == torch.bfloat16)


def _sizes(raw: Tensor, begin: int) -> object:
    return numbers([*raw.shape, raw.stride(0), begin])


def _flags(shaping: Shaping, entropy: bool) -> tuple[int, int]:
    return int(shaping.capped), int(entropy)

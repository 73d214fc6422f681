"""Run the two functions of `epilogue.py` on a CPU in compiled code (cpu/epilogue.cpp), each in one pass over memory."""

import torch
from torch import Tensor

from gspo.kernels.epilogue import Shaping
from gspo.kernels.native import call, numbers


def add_statistics(raw: Tensor, begin: int, targets: Tensor, stats: Tensor, shaping: Shaping) -> None:
    """Compute `epilogue.add_statistics`, raw in float32 or bfloat16, stats in float32."""
    assert raw.stride(1) == 1 and stats.is_contiguous() and stats.dtype == torch.float32
    call("gspo_statistics", _half(raw), raw, targets, stats, _sizes(raw, begin), *_numbers(shaping))


def to_gradient(raw: Tensor, begin: int, targets: Tensor, rows: Tensor, shaping: Shaping) -> None:
    """Compute `epilogue.to_gradient`, raw in float32 or bfloat16, rows in float32."""
    assert raw.stride(1) == 1 and rows.is_contiguous() and rows.dtype == torch.float32
    call("gspo_gradient", _half(raw), raw, targets, rows, _sizes(raw, begin), *_numbers(shaping))


def _half(raw: Tensor) -> int:
    return int(raw.dtype == torch.bfloat16)


def _sizes(raw: Tensor, begin: int) -> object:
    return numbers([*raw.shape, raw.stride(0), begin])


def _numbers(shaping: Shaping) -> tuple[float, float, int]:
    return shaping.inner, shaping.outer, int(shaping.capped)

"""Choose fp32 or bf16 for the matrix products (`model.precision`); weights and optimizer are fp32 either way."""

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspo.errors import UserError
from gspo.system.console import say

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIN_HIDDEN_SIZE = 512  # narrower models stay in fp32: products are little of their step, and rounding shows most
MIN_SPEEDUP = 1.5  # of bf16 over fp32, from which `auto` chooses it


def choose_precision(precision: str, device: torch.device, model_config: Any) -> tuple[str, str]:
    """Return (`fp32` or `bf16`, what was measured, in a few words, or "").

    `auto` is bf16 on a GPU that has it, and UserError says so where another one is to compute in it: PyTorch would
    emulate it, slowly. On a CPU it is measured in a second, by products of the model's width, forward
    and backward. A busy machine may give another result the next day, so a run keeps its first.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not has_bf16:
            raise UserError(
                f"model.precision = bf16: {torch.cuda.get_device_name(device)} cannot compute in bf16, as GPUs from "
                "Ampere on can. Set model.precision=fp32, in a run of its own (trainer.run_name) if this one has begun."
            )
        return ("bf16" if has_bf16 else "fp32") if precision == "auto" else precision, ""
    if precision != "auto":
        return precision, ""
    width = model_config.get_text_config().hidden_size
    if width < MIN_HIDDEN_SIZE:
        return "fp32", ""
    times = bf16_speedup(min(width, 1024))
    return "bf16" if times >= MIN_SPEEDUP else "fp32", f"bf16 products are {times:.1f} times as fast on this CPU"


def allow_tf32(wanted: bool, device: torch.device) -> None:
    """Let float32 products of this process round to TF32 on a GPU from Ampere on; a line says where there is none.

    To be called once a model has passed its checks, which compare float32 numbers.
    """
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted and not ampere:
        say("model.tf32=true changes nothing: only GPUs from Ampere on have TF32.")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if wanted and ampere else "highest")


def bf16_speedup(width: int) -> float:
    """Time a linear layer [256, width] -> [256, 4 width], forward and backward -> seconds in fp32 / in bf16."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, width, generator=g), torch.randn(4 * width, width, generator=g)
    x.requires_grad_()
    w.requires_grad_()
    ratios = [_seconds(x, w, torch.float32) / _seconds(x, w, torch.bfloat16) for _ in range(6)]
    return statistics.median(ratios[1:])


def _seconds(x: Tensor, w: Tensor, dtype: torch.dtype) -> float:
    began = time.perf_counter()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = F.linear(x, w)
    torch.autograd.grad(y.sum(), (x, w))
    return time.perf_counter() - began


def cast_linear_layers(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast linear layers to `dtype` once, as autocast would at every forward.

    Not those tied to an embedding: autocast leaves embeddings alone.
    """
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    for m in model.modules():
        if isinstance(m, nn.Linear) and m.weight not in embeddings:
            m.to(dtype)
    return model

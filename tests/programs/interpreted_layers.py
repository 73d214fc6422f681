"""Runs the Triton kernels of layers on CPU tensors, and prints, as JSON, what is too far from float64, or, of whole
models with their gradients, from transformers.

Started as `interpreted_layers.py STEP` with TRITON_INTERPRET=1: only every STEP-th case.
"""

import json
import sys
from functools import partial

import torch
from architectures import tiny_model
from interpreted_logprob import repair_interpreter, use_triton
from layer_kernel_cases import Case, cases
from torch import Tensor, nn

from gspo.kernels import norm_gate_rotary, norm_gate_rotary_triton, write_tokens
from gspo.models import kernel_layers

IDS = torch.tensor([[5, 6, 7], [11, 3, 2]])


def numbers_of(model: nn.Module) -> list[Tensor]:
    """Logits and all gradients."""
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


def model_differs(family: str) -> list[str]:
    model = tiny_model(family)
    theirs = numbers_of(model)
    with kernel_layers.layer_kernels_enabled():
        ours = numbers_of(model)
    off = [float((a - b).abs().max() / (1e-6 + b.abs().max())) for a, b in zip(ours, theirs, strict=True)]
    assert any(off), "no kernel was used"
    return [f"number {k} is off by {x:.3g} of the largest" for k, x in enumerate(off) if x > 1e-4]


def models() -> list[Case]:
    return [(family, partial(model_differs, family)) for family in ("llama", "qwen3", "gemma2", "deepseek_v3")]


def main() -> None:
    repair_interpreter()
    torch.use_deterministic_algorithms(True)  # which also fills new tensors with NaN
    use_triton(norm_gate_rotary)
    use_triton(write_tokens)
    norm_gate_rotary_triton.TILE, norm_gate_rotary_triton.PROGRAMS = 128, 3  # several tiles a program
    kernel_layers.SUMS_ON.add("cpu")
    every = [*models(), *cases("cpu")]
    print(json.dumps({name: compare() for name, compare in every[:: int(sys.argv[1])]}))


if __name__ == "__main__":
    main()

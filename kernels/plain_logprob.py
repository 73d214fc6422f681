"""Compute the linear log-prob as plainly as PyTorch allows: the reference of its tests and benchmarks."""

import torch
from torch import Tensor


def reference_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return the log-prob [T] of targets [T] from hidden [T, D] and weight [V, D].

    All [T, V] logits are held at once, in float32 (float64 for float64 inputs).
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]

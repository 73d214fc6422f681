"""What the kernels compute, written down as plainly as PyTorch allows: the measure of tests and benchmarks."""

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
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """hidden [T, D], weight [V, D], targets [T] -> log-prob [T], entropy [T] in nats or None.

    All [T, V] logits are held at once, in float32 (float64 for float64 inputs).
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = (logits / temperature).log_softmax(-1)
    chosen = logprobs.gather(-1, targets[:, None])[:, 0]
    return chosen, -(logprobs.exp() * logprobs).sum(-1) if entropy else None

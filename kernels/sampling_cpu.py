"""The draw of a token for CPUs, in compiled code (cpu/sampling.cpp), where no token is ruled out.

What kernels/sampling.py says, in one kernel: float32 sums of blocks, added up in float64, choose a block of a row, and
float64 sums inside it the token. A row of NaN has log-probs and entropies of NaN.
"""

import torch
from torch import Tensor

from gspo.kernels.native import call, numbers, takes


def serves(logits: Tensor) -> bool:
    """Whether `sample` takes such logits."""
    return logits.shape[-1] > 0 and takes(logits)


def sample(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw as `sampling.sample` does, logits in float32 or bfloat16. The draw must not be truncated."""
    assert temperature == 0 or (top_k == 0 and top_p == 1.0 and min_p == 0.0), (top_k, top_p, min_p)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty_like(keys)
    logprobs, entropies = (torch.empty(len(logits), dtype=torch.float32) for _ in range(2))
    call(
        "gspo_draw",
        int(logits.dtype == torch.bfloat16),
        logits,
        numbers([*logits.shape, logits.stride(0)]),
        keys,
        positions,
        1.0 / (temperature or 1.0),
        int(temperature == 0),
        tokens,
        logprobs,
        entropies,
    )
    return tokens, logprobs, entropies

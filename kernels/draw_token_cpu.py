"""Draw one token for each row of logits on a CPU in compiled code, if the draw is not truncated.

Computes what kernels/draw_token.py says: float32 sums of blocks, added up in float64, choose a block of a row, and
float64 sums inside it choose the token. A row with a NaN has a log-prob and an entropy of NaN.
"""

import torch
from torch import Tensor

from gspo.kernels.native import call, cpu_kernels_take, is_bf16, size_array


def serves(logits: Tensor) -> bool:
    """Return whether `sample` takes these logits [S, V]."""
    return logits.shape[-1] > 0 and cpu_kernels_take(logits)


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
        "gspo_draw", bf16=is_bf16(logits), logits=logits, sizes=size_array(*logits.shape, logits.stride(0)), keys=keys,
        positions=positions, inverse=1.0 / (temperature or 1.0), greedy=temperature == 0, tokens=tokens,
        logprobs=logprobs, entropies=entropies,
    )  # fmt: skip
    return tokens, logprobs, entropies

"""Draw one token for each row of logits by inverse CDF, by a Triton or a C++ kernel.

With z = logits / T and top = max z, a row's weights are w = exp(z - top). A draw u picks the first token at which their
running sum reaches u sum(w). Only tokens with z - top >= least take part: `least` is what top_k, top_p and min_p leave,
applied in this order. The log-prob and the entropy are those of softmax(z), not truncated.

1. For chunks of a row in parallel: top, the sum of w and of w (z - top), and float32 sums of every BLOCK entries.
2. If the draw is truncated: `least` of each row without sorting, 2 bits of a float's order a pass over the row
   (8 passes for bfloat16), then the sums of BLOCK entries again.
3. A row's block sums, added up in float64, choose the block; float64 sums inside it choose the token.

u is that of `uniforms` in gspo/rollout/draw_tokens.py: a hash of a row's key and position, computed where it is needed.
On CUDA (`draw_token_triton.py`) that is two launches, four if truncated; `draw_token_cpu.py` has steps 1 and 3.
"""

import torch
from torch import Tensor

from gspo.kernels import draw_token_cpu
from gspo.kernels.dispatch import Implementation, choose, on_cuda, triton_kernel

IMPLEMENTATIONS = (  # for logits [S, V], and whether the draw is truncated
    Implementation(on_cuda, triton_kernel("draw_token_triton", "sample")),
    Implementation(
        lambda logits, truncated: draw_token_cpu.serves(logits) and not truncated,
        lambda logits, truncated: draw_token_cpu.sample,
    ),
)


def sample(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Draw a token a row; return None where no kernel takes these logits (then gspo/rollout/draw_tokens.py draws).

    logits [S, V], keys, positions [S] int64 -> tokens [S] int64, log-probs [S] and entropies [S] in nats, float32.
    `temperature` 0 is greedy: the first of the most likely tokens, with its log-prob at temperature 1. A token of
    probability 0 is never drawn, and no token outside the vocabulary whatever the logits are.
    """
    assert logits.ndim == 2 and keys.shape == positions.shape == logits.shape[:1], (logits.shape, keys.shape)
    assert keys.dtype == positions.dtype == torch.int64, (keys.dtype, positions.dtype)
    truncated = temperature != 0 and (top_k > 0 or top_p < 1.0 or min_p > 0.0)
    draw = choose(IMPLEMENTATIONS, logits, truncated)
    if draw is None:
        return None
    return draw(logits, keys.contiguous(), positions.contiguous(), temperature, top_k, top_p, min_p)

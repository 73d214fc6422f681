"""One token a row of logits, by inverse CDF, on CUDA: rollout/sampling.py's draw in two launches, four if it truncates.

With z = logits / T and top = max z, a row's weights are w = exp(z - top). A draw u picks the first token at which their
running sum reaches u sum(w); among those with z - top >= least, where top_k, top_p and min_p, in this order, want it.
The log-prob and the entropy are those of softmax(z), not truncated.

1. Chunks of a row side by side: top, sum of weights and of w (z - top), and float32 sums of every BLOCK entries.
2. If tokens are ruled out: `least` of each row without sorting, 2 bits of a float's order a pass over the row
   (8 passes for bfloat16), then the sums of BLOCK entries again.
3. A row's sums, added up in float64, choose the block; float64 sums inside it choose the token.

u is that of `uniforms` in gspo/rollout/sampling.py, a hash of a row's key and position, computed where it is needed.
"""

import functools
import importlib.util

import torch
from torch import Tensor


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def serves(logits: Tensor) -> bool:
    """Whether `sample` takes such logits."""
    return logits.is_cuda and logits.dtype != torch.float64 and installed()


def sample(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [S, V] in float32 or half precision, keys, positions [S] int64 -> tokens [S] int64, log-probs [S] and
    entropies [S] in nats, float32.

    `temperature` 0 is greedy: the first of the likeliest, with its log-prob at temperature 1. A token of probability 0
    is not drawn, and no token outside the vocabulary whatever the logits are.
    """
    assert logits.ndim == 2 and logits.dtype != torch.float64, (logits.shape, logits.dtype)
    assert keys.shape == positions.shape == logits.shape[:1] and keys.dtype == positions.dtype == torch.int64
    from gspo.kernels import sampling_triton

    return sampling_triton.sample(logits, keys.contiguous(), positions.contiguous(), temperature, top_k, top_p, min_p)

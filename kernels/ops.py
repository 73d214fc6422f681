"""Operations that are worth writing by hand. They know tensors, and neither models nor training.

`linear_logprob` runs as Triton kernels around cuBLAS on CUDA, and as plain PyTorch elsewhere; `pairwise_loss` as one
Triton kernel, or plain PyTorch. `varlen.py` finds the FlashAttention that gives its log-sum-exp. The sampler's are
`decode.py`, attention over pages, and `sampling.py`, the draw of a token.
"""

from gspo.kernels.logprob import linear_logprob, linear_logprob_and_grad
from gspo.kernels.pair_settings import PairSettings, PairwiseLoss
from gspo.kernels.pairwise import pairwise_loss
from gspo.kernels.reference import reference_linear_logprob

__all__ = [
    "PairSettings",
    "PairwiseLoss",
    "linear_logprob",
    "linear_logprob_and_grad",
    "pairwise_loss",
    "reference_linear_logprob",
]

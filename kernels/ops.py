"""Export the operations of training. Kernels know tensors, and neither models nor training.

Each operation is a file with its formulas in PyTorch and a table of its implementations (`dispatch.py`); beside it
stand `_triton.py` (CUDA) and `_cpu.py` (C++). `linear_logprob` puts such kernels between matrix products,
`pairwise_loss` is one Triton kernel. `segment_attention.py` chooses a FlashAttention that returns its log-sum-exp.
`norm_gate_rotary.py` computes what stands between a model's matrix products. The sampler uses `decode_attention.py`,
attention over pages, and `draw_token.py`, the draw of a token; on CPUs also `packed_attention_cpu.py`,
`panel_linear_cpu.py` and `decoder_layers_cpu.py`, which exist in C++ only and replace PyTorch's operators.
"""

from gspo.kernels.logprob import linear_logprob, linear_logprob_and_grad
from gspo.kernels.pair_settings import PairSettings, PairwiseLoss
from gspo.kernels.pairwise import pairwise_loss
from gspo.kernels.plain_logprob import reference_linear_logprob

__all__ = [
    "PairSettings",
    "PairwiseLoss",
    "linear_logprob",
    "linear_logprob_and_grad",
    "pairwise_loss",
    "reference_linear_logprob",
]

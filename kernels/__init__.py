"""Operations that are worth writing by hand. They know tensors, and neither models nor training.

`linear_logprob` runs as Triton kernels around cuBLAS on CUDA, and as plain PyTorch elsewhere.
"""

from kernels.logprob import linear_logprob, linear_logprob_and_grad
from kernels.reference import reference_linear_logprob

__all__ = ["linear_logprob", "linear_logprob_and_grad", "reference_linear_logprob"]

"""Runs the Triton kernels of layers on CPU tensors, and prints, as JSON, what is too far from float64.

Started as `interpreted_layers.py STEP` with TRITON_INTERPRET=1: only every STEP-th case.
"""

import json
import sys

import torch
from interpreted_logprob import repair_interpreter, use_triton
from layer_kernel_cases import cases

from gspo.kernels import norm_gate_rotary, norm_gate_rotary_triton, write_tokens


def main() -> None:
    repair_interpreter()
    torch.use_deterministic_algorithms(True)  # which also fills new tensors with NaN
    use_triton(norm_gate_rotary)
    use_triton(write_tokens)
    norm_gate_rotary_triton.TILE, norm_gate_rotary_triton.PROGRAMS = 128, 3  # several tiles a program
    print(json.dumps({name: compare() for name, compare in cases("cpu", int(sys.argv[1]))}))


if __name__ == "__main__":
    main()

"""Runs the pairwise kernel on CPU tensors in Triton's interpreter and prints, as JSON, what is too far from float64."""

import json

import torch
from interpreted_logprob import repair_interpreter, use_triton
from pairwise_cases import cases, too_far

from gspo.kernels import pairwise


def main() -> None:
    repair_interpreter()
    torch.use_deterministic_algorithms(True)  # which also fills new tensors with NaN
    use_triton(pairwise)
    print(json.dumps({case.name(): too_far(case) for case in cases()}))


if __name__ == "__main__":
    main()

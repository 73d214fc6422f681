"""Runs the attention of decoding on CPU tensors in Triton's interpreter and prints what is too far from float64.

Started as `interpreted_decode.py STEP`: only every STEP-th case.
"""

import json
import sys

import torch
from decode_cases import cases, too_far
from interpreted_logprob import repair_interpreter, use_triton

from gspo.kernels import decode_attention, decode_attention_triton


def main() -> None:
    repair_interpreter()
    torch.use_deterministic_algorithms(True)  # which also fills new tensors with NaN
    decode_attention_triton.SHARE = 32  # several programs a sequence
    decode_attention_triton.processors = lambda device: 132  # and more of them, where there are few sequences
    use_triton(decode_attention)
    print(json.dumps({case.name(): too_far(case) for case in cases()[:: int(sys.argv[1])]}))


if __name__ == "__main__":
    main()

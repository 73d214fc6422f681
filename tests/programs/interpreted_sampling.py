"""Runs the draw of a token on CPU tensors in Triton's interpreter and prints, as JSON, what differs from PyTorch's."""

import json

import torch
from interpreted_logprob import repair_interpreter, use_triton
from sampling_cases import cases, differences, keys_of, observed

import triton  # isort: skip
import triton.language as tl  # isort: skip

from gspo.kernels import draw_token, draw_token_triton
from gspo.rollout.draw_tokens import Sampling, uniforms


@triton.jit
def uniform_kernel(keys_ptr, positions_ptr, out_ptr):
    row = tl.program_id(0)
    u = draw_token_triton.uniform(tl.load(keys_ptr + row), tl.load(positions_ptr + row))
    tl.store(out_ptr + row, u)


def main() -> None:
    repair_interpreter()
    torch.use_deterministic_algorithms(True)  # which also fills new tensors with NaN
    use_triton(draw_token)
    draw_token_triton.PER_CHUNK, draw_token_triton.PIECE = 2, 1024  # several chunks, and pieces, a row
    keys, positions = keys_of(100)
    u = torch.empty(100, dtype=torch.float64)
    uniform_kernel[(100,)](keys, positions, u)
    counts = [x.tolist() for x in observed(12, Sampling(0.8), 120)]
    wrong = {case.name(): differences(case) for case in cases()}
    print(json.dumps({"uniforms": torch.equal(u, uniforms(keys, positions)), "counts": counts, "wrong": wrong}))


if __name__ == "__main__":
    main()

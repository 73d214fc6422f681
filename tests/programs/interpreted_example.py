"""Run the kernel of docs/extending.md on CPU tensors in Triton's interpreter; print its distance to the formula.

Started as `interpreted_example.py FOLDER`, with TRITON_INTERPRET=1; FOLDER holds the page's two files.
"""

import json
import sys
from pathlib import Path

import torch
from interpreted_logprob import repair_interpreter, use_triton

import gspo.kernels


def main() -> None:
    gspo.kernels.__path__.append(str(Path(sys.argv[1])))
    from gspo.kernels import kl_rows

    repair_interpreter()
    formula = kl_rows.plain_kl_rows
    assert kl_rows.choose(kl_rows.IMPLEMENTATIONS, torch.zeros(1)) is formula  # without a GPU
    use_triton(kl_rows)
    torch.manual_seed(0)
    logprobs, reference = torch.randn(2, 5, 13)
    lengths = torch.tensor([13, 0, 1, 7, 12])
    expected = formula(logprobs.double(), reference.double(), lengths)
    print(json.dumps(float((kl_rows.kl_rows(logprobs, reference, lengths) - expected).abs().max())))


if __name__ == "__main__":
    main()

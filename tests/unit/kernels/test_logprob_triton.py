"""The Triton kernels without a GPU: their arithmetic in Triton's interpreter, and what the compiler makes of them."""

import pytest
from triton_programs import results

pytest.importorskip("triton", reason="Triton is made for Linux only")


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_interpreted_kernels_are_as_near_to_float64_as_plain_pytorch(tmp_path, step):
    """Several chunks of several blocks, no chunk a multiple of the block; unwritten memory is NaN."""
    found = results("interpreted_logprob.py", tmp_path, str(step))  # every step-th case
    wrong = [line for lines in found.values() for line in lines]
    assert len(found) == len(range(0, 24, step)) and not wrong, "\n".join(wrong)

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


@pytest.mark.slow
def test_kernels_compile_for_sm_80_and_sm_90a_with_nothing_spilled_and_wide_loads(tmp_path):
    found = results("compiled_logprob.py", tmp_path)
    assert len(found) == 16
    for name, said in found.items():
        assert said["spilled"] == 0 and said["registers"] <= 64, (name, said)
        assert said["wide"] == (2 if "bf16" in name else 4), (name, said)  # 16 elements a thread, 16 bytes a load

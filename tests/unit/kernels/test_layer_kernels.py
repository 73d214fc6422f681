"""What stands between a model's matrix products: the formulas, and their Triton kernels without a GPU."""

import pytest
import torch
import torch.nn.functional as F
from triton_programs import results

from gspo.kernels.norm_gate_rotary import add_rms_norm, rms_norm, rotate, silu_product
from gspo.kernels.write_tokens import write_tokens


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_in_float64_the_formulas_are_pytorchs_and_so_are_their_gradients():
    x, branch, weight = numbers(3, 4, 5), numbers(3, 4, 5), numbers(5)
    assert torch.allclose(rms_norm(x, weight, 1e-5, 1.0), F.rms_norm(x, (5,), weight + 1, 1e-5))
    total, y = add_rms_norm(x, branch, weight, 1e-5)
    assert total.equal(x + branch) and torch.allclose(y, F.rms_norm(x + branch, (5,), weight, 1e-5))
    gate, up = numbers(3, 7), numbers(3, 7)
    assert torch.allclose(silu_product(gate, up), F.silu(gate) * up)
    q, k, cos, sin = numbers(2, 3, 5, 6), numbers(2, 1, 5, 6), *torch.randn(2, 2, 5, 6, dtype=torch.float64)
    for found, given in zip(rotate(q, k, cos, sin), (q, k), strict=True):
        low, high = given.chunk(2, -1)
        assert torch.allclose(found, given * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None])
    assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, 1e-5, 1.0), (x, weight))
    assert torch.autograd.gradcheck(lambda *t: add_rms_norm(*t, 1e-5), (x, branch, weight))
    assert torch.autograd.gradcheck(silu_product, (gate, up))
    assert torch.autograd.gradcheck(lambda *t: rotate(*t, cos, sin), (q, k))


def test_a_backward_pass_keeps_inputs_and_a_number_a_row():
    x, branch, weight, gate, up = numbers(3, 4, 5), numbers(3, 4, 5), numbers(5), numbers(3, 7), numbers(3, 7)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        silu_product(gate, up)
        assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]
        kept.clear()
        total, _ = add_rms_norm(x, branch, weight, 1e-5)
    assert [t.shape for t in kept] == [(3, 4, 5), (5,), (3, 4)] and kept[0].data_ptr() == total.data_ptr()


def test_tokens_are_written_to_their_places():
    pools = torch.zeros(3, 2, 4, 5), torch.zeros(3, 2, 4, 6)
    keys, values, places = torch.randn(2, 2, 5), torch.randn(2, 2, 6), torch.tensor([8, 12, 3, 7])
    write_tokens(*pools, places, keys, values)
    assert pools[0][1, :, 0].equal(keys[0]) and pools[0][0, :, 3].equal(keys[1])
    assert pools[1][1, :, 0].equal(values[0]) and pools[1].count_nonzero() == values.numel()


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_interpreted_kernels_are_as_near_to_float64_as_plain_pytorch(tmp_path, step):
    """Odd sizes, slices of wider rows, half precision beside float32; whole models, too. Unwritten memory is NaN."""
    pytest.importorskip("triton", reason="Triton is made for Linux only")
    found = results("interpreted_layers.py", tmp_path, str(step))  # every step-th case
    wrong = [f"{name}: {line}" for name, lines in found.items() for line in lines]
    assert len(found) == len(range(0, 80, step)) and not wrong, "\n".join(wrong)

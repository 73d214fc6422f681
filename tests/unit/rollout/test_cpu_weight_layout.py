"""Linear layers with laid-out weights give the same products, and are as before afterwards."""

import pytest
import torch
from architectures import tiny_model
from torch import nn

from gspo.rollout import cpu_weight_layout as module
from gspo.rollout.cpu_weight_layout import laid_out_weights

THERE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
pytestmark = pytest.mark.bf16
needed = pytest.mark.skipif(not THERE, reason="this PyTorch has no such operators")  # not: they fail the trial


class Two(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(40, 24, dtype=dtype), nn.Linear(24, 40, bias=False, dtype=dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 40), (7, 1, 40), (2, 33, 40)])
def test_products_are_the_same_to_rounding(dtype, shape):
    model, x = Two(dtype), torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        plain, exact = model(x).double(), Two(torch.float64)
        exact.load_state_dict(model.state_dict())
        exact = exact(x.double())
        with laid_out_weights(model, 7):
            mine = model(x).double()
    assert (mine - exact).abs().max() <= 4 * (plain - exact).abs().max() + 1e-7
    assert "forward" not in vars(model.first)


@needed
def test_layers_are_as_before_after_an_error():
    model = tiny_model("llama")
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    with pytest.raises(KeyboardInterrupt), laid_out_weights(model, 4):
        assert sum("forward" in vars(m) for m in linear) == 15  # 2 layers of 7, and the head
        raise KeyboardInterrupt
    assert not [m for m in linear if "forward" in vars(m)]
    model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


@needed
def test_new_weights_are_seen_by_the_next_rollout():
    model, x = Two(torch.float32), torch.randn(3, 40)
    with torch.no_grad():
        with laid_out_weights(model, 3):
            before = model(x)
        model.second.weight.mul_(2.0)
        with laid_out_weights(model, 3):
            torch.testing.assert_close(model(x), 2 * before)


def test_a_model_that_would_not_fit_twice_is_left_alone(monkeypatch):
    monkeypatch.setattr(module, "SHARE", 0.0)
    model = Two(torch.float32)
    with laid_out_weights(model, 3):
        assert "forward" not in vars(model.first)

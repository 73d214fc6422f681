"""Which modules of a model the kernels of layers may stand for, beside those of test_cpu_kernels.py."""

import pytest
import torch
from architectures import tiny_model
from torch import nn

from gspo.models.kernel_layers import is_residual_layer, norm_offset, norm_widens
from gspo.models.loading import decoder_layers


@pytest.mark.parametrize(
    ("family", "more", "taken"),
    [
        ("llama", {}, True),
        ("qwen3", {}, True),
        ("mixtral", {}, True),
        ("granite", {}, True),
        ("granite", {"residual_multiplier": 0.5}, False),
        ("gemma2", {}, False),  # norms behind attention and MLP, too
        ("olmo2", {}, False),
        ("cohere", {}, False),  # attention and MLP side by side
    ],
)
def test_layers_with_a_sum_before_their_second_norm_are_found_by_what_they_compute(family, more, taken):
    assert {is_residual_layer(layer) for layer in decoder_layers(tiny_model(family, **more))} == {taken}


def test_a_layer_that_keeps_an_argument_from_its_attention_is_not_taken():
    layer = decoder_layers(tiny_model("llama"))[0]

    class Forgetful(type(layer)):
        def forward(self, hidden_states, pack=None, **given):
            return super().forward(hidden_states, **given)

    assert is_residual_layer(layer)
    layer.__class__ = Forgetful
    assert not is_residual_layer(layer)


@pytest.mark.parametrize(("family", "widens"), [("llama", True), ("gemma2", False), ("olmo2", False)])
def test_what_dtype_a_norm_in_float32_makes_of_half_precision_is_found(family, widens):
    norms = [m for m in tiny_model(family).modules() if norm_offset(m) is not None]
    assert {norm_widens(m) for m in norms} == {widens}
    x = torch.randn(3, norms[0].weight.numel()).bfloat16()
    assert (type(norms[0]).forward(norms[0], x).dtype == torch.float32) == widens


def test_a_module_that_is_no_norm_does_not_widen():
    assert not norm_widens(nn.Linear(8, 8))

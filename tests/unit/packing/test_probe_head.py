"""Scale and soft cap of a head are measured; with a head of another kind, log-probs come from the model's logits."""

from dataclasses import replace

import pytest
import torch
from architectures import tiny_model
from plain_logprobs import RAGGED, SOME_ROWS, assert_plain
from torch import nn

from gspo.packing.probe_head import Head, measure_head


def after(change):
    """A llama whose class does one thing more to its logits."""
    model = tiny_model("llama")

    def hook(model, _, output):
        output.logits = change(model, output.logits)
        return output

    model.register_forward_hook(hook)
    return model


@pytest.mark.parametrize(
    ("family", "extra", "expected"),
    [
        ("llama", {}, (1.0, None)),
        ("phi", {}, (1.0, None)),
        ("granite", {"logits_scaling": 3.0}, (1 / 3, None)),  # divides
        ("hyperclovax", {"logits_scaling": 3.0}, (3.0, None)),  # multiplies
        ("cohere", {"logit_scale": 0.25}, (0.25, None)),
        ("gemma2", {"final_logit_softcapping": 7.0}, (1.0, 7.0)),
        ("gemma2", {"final_logit_softcapping": 3000.0}, (1.0, 3000.0)),  # no logit of this model shows it
        ("gemma2", {"final_logit_softcapping": None}, (1.0, None)),
    ],
)
def test_scale_and_cap_by_architecture(family, extra, expected):
    scale, softcap = measure_head(tiny_model(family, **extra))
    assert scale == pytest.approx(expected[0], rel=1e-6) and softcap == expected[1]


def test_a_scale_under_a_cap():
    scale, softcap = measure_head(after(lambda model, z: 4.0 * torch.tanh(2.5 * z / 4.0)))
    assert scale == pytest.approx(2.5, rel=1e-6) and softcap == pytest.approx(4.0, rel=1e-6)


def test_a_head_by_hand():
    y = torch.tensor([0.0, 1.0, 1e9])
    assert Head(3.0, None)(y).tolist() == [0.0, 3.0, 3e9]
    assert Head(3.0, 2.0)(y).tolist() == pytest.approx([0.0, 1.8102965, 2.0])  # 2 tanh(3 / 2)


def an_offset_not_yet_trained():
    model = after(lambda model, z: z + model.offset)
    model.offset = nn.Parameter(torch.zeros(97))
    return model


def a_constant_offset():
    offset = 1e-3 * torch.randn(97, generator=torch.Generator().manual_seed(0))
    return after(lambda model, z: z + offset)


def a_layer_that_scales():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    model = tiny_model("llama")
    model.lm_head.__class__ = Scaled
    return model


ODD = {
    "a trainable offset, zero as yet": an_offset_not_yet_trained,
    "a constant offset": a_constant_offset,
    "an output layer of another class": a_layer_that_scales,
    "another curve": lambda: after(lambda model, z: 3.0 * torch.asinh(z / 3.0)),
    "a token that is never sampled": lambda: after(lambda model, z: z.index_fill(-1, torch.tensor([0]), -1e4)),
    "logits for a part of the weight's rows": lambda: after(lambda model, z: z[..., :96]),
    "hidden states changed before the head": lambda: tiny_model("minicpm3", num_key_value_heads=4, dim_model_base=16),
}


@pytest.mark.parametrize("kind", ODD)
def test_another_kind_of_head_is_left_to_the_model(kind):
    model = ODD[kind]()
    assert measure_head(model.eval()) is None
    assert_plain(model, replace(RAGGED, tokens=RAGGED.tokens.clamp_max(95)), SOME_ROWS)


def test_no_hook_is_left_behind():
    model = tiny_model("gemma2")
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    measure_head(model)
    assert not model.lm_head._forward_hooks and model(input_ids=ids).logits.equal(before)

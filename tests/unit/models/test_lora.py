"""The setting model.lora, and which layers it adapts."""

import sys

import pytest
import torch
from architectures import SMALL, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from gspo.errors import UserError
from gspo.models.lora import Lora, adapted_layers, add_adapters, find_targets, merged, require_peft

ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({}, None),
        ({"rank": 4}, Lora(4, 8)),
        ({"rank": 4, "alpha": 12.5, "dropout": 0.0}, Lora(4, 12.5)),
        ({"rank": 4, "targets": ["q_proj", "v_proj"]}, Lora(4, 8, ("q_proj", "v_proj"))),
        ({"rank": 4, "targets": "all-linear"}, Lora(4, 8)),
        ({"rank": 4, "targets": ["all-linear"]}, Lora(4, 8)),
        ({"rank": 4, "targets": "q_proj"}, Lora(4, 8, ("q_proj",))),
        ({"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "lora_dropout": 0}, Lora(4, 16, ("q_proj",))),
    ],
)
def test_the_setting_is_read_also_by_the_names_of_peft(setting, expected):
    assert Lora.of(setting) == expected


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"rnk": 4}, "'rnk' is no part of it: there are rank, alpha, targets and dropout"),
        ({"alpha": 4}, "rank = None is no whole number from 1 on"),
        ({"rank": 0}, "rank = 0 is no"),
        ({"rank": 2.5}, "rank = 2.5 is no"),
        ({"rank": True}, "rank = True is no"),
        ({"rank": 4, "r": 4}, "r is given twice"),
        ({"rank": 4, "alpha": 0}, "alpha = 0 is no number above 0"),
        ({"rank": 4, "alpha": float("inf")}, "alpha = inf"),
        ({"rank": 4, "alpha": "two"}, "alpha = 'two'"),
        ({"rank": 4, "dropout": 0.1}, "dropout = 0.1 is refused: a policy that is trained with dropout is not the one"),
        ({"rank": 4, "targets": []}, "targets = .. is no list of names"),
        ({"rank": 4, "targets": [3]}, "targets = .3. is no list of names"),
    ],
)
def test_a_wrong_setting_is_one_paragraph_with_an_example(setting, why):
    with pytest.raises(UserError, match=rf"model.lora: {why}") as e:
        Lora.of(setting)
    assert str(e.value).endswith(
        "For example: model.lora={rank: 16}, or {rank: 16, alpha: 32, targets: [q_proj, v_proj]}."
    )


def test_all_linear_layers_of_the_decoder_are_adapted_and_never_the_head():
    model = tiny_model("llama", tie_word_embeddings=False)
    found = find_targets(model, Lora(4, 8))
    assert {name.rpartition(".")[2] for name in found} == ALL and len(found) == 7 * SMALL["num_hidden_layers"]
    with pytest.raises(
        UserError, match="targets has 'lm_head', and no linear layer of llama's decoder is called so; it has"
    ):
        find_targets(model, Lora(4, 8, ("q_proj", "lm_head")))


def test_of_a_model_with_a_tower_for_images_only_the_text_is_adapted():
    found = find_targets(tiny_model("gemma3"), Lora(4, 8))
    assert found and not [name for name in found if "vision" in name]


def test_layers_are_named_by_ends_or_by_one_name():
    model = tiny_model("llama")
    assert find_targets(model, Lora(4, 8, ("mlp.up_proj",))) == [f"model.layers.{k}.mlp.up_proj" for k in range(2)]
    assert find_targets(model, Lora(4, 8, ("model.layers.1.mlp.up_proj",))) == ["model.layers.1.mlp.up_proj"]


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        UserError, match="model.lora needs the package peft.*`pip install peft`, or leave model.lora empty"
    ):
        require_peft()


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_pefts_layers_stand_where_they_are_meant_to_and_the_first_adapter_alone_is_trained(family):
    pytest.importorskip("peft")
    model = tiny_model(family).to("meta")
    targets = find_targets(model, Lora(4, 8))
    add_adapters(model, Lora(4, 8), ["policy", "opponent"])
    assert [*adapted_layers(model)] == targets
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(targets) and all(".policy." in name for name in trained)


@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_merged_weights_are_the_formula(seed, dtype):
    g = torch.Generator().manual_seed(seed)
    base, a, b = (torch.randn(*shape, generator=g) for shape in ((5, 7), (3, 7), (5, 3)))
    base = base.to(dtype)
    expected = base.double() + 2.5 * b.double() @ a.double()
    found = merged(base, a, b, 2.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)

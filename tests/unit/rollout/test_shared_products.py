"""Linear layers that are given the same tensor: found by a trial, joined without a second copy."""

import pytest
import torch
import torch.nn.functional as F
from architectures import tiny_model

from gspo.rollout import shared_products as module
from gspo.rollout.attention_inputs import pack_prompts
from gspo.rollout.shared_products import join_weights, layers_given_alike, shared_products
from gspo.rollout.slot_attention import forward

CPU = torch.device("cpu")
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
LATENT = ("q_a_proj", "kv_a_proj_with_mqa")


def logits(model):
    with torch.no_grad():
        return forward(model, pack_prompts([(5, 6, 7)], CPU))


@pytest.mark.parametrize(
    ("family", "groups"),
    [("llama", {ATTENTION, MLP}), ("qwen2", {ATTENTION, MLP}), ("gemma2", {ATTENTION, MLP}), ("phi3", set()),
     ("mixtral", {ATTENTION}), ("deepseek_v3", {LATENT, MLP})],
)  # fmt: skip
def test_layers_given_the_same_tensor_are_found_by_a_trial(family, groups):
    model = tiny_model(family)
    names = {m: name.split(".")[-1] for name, m in model.named_modules()}
    with torch.no_grad():
        found = layers_given_alike(model, CPU)
    assert {tuple(names[m] for m in group) for group in found} == groups


def joined(family, monkeypatch):
    model = tiny_model(family)
    with torch.no_grad():
        monkeypatch.setitem(module._JOINED, model, [*map(module._Product, layers_given_alike(model, CPU))])
    return model


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_one_product_gives_what_several_give(family, monkeypatch):
    plain, model = tiny_model(family), joined(family, monkeypatch)
    calls = []
    multiply = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: calls.append(args[1].shape) or multiply(*args))
    with shared_products(model):
        found = logits(model)
    together = len(calls)
    torch.testing.assert_close(found, logits(plain), rtol=1e-5, atol=1e-5)
    assert len(calls) - together > together, "fewer than half as many"


def test_a_weight_that_is_written_later_is_in_the_product_and_memory_is_taken_once(monkeypatch):
    model, other = joined("llama", monkeypatch), tiny_model("llama", seed=1)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.copy_(q)
    with shared_products(model):
        torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)
    attention = model.model.layers[0].self_attn
    storages = {x.weight.untyped_storage().data_ptr() for x in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(storages) == 1


def test_on_a_cpu_nothing_is_joined():
    model = tiny_model("llama")
    join_weights(model, CPU)
    assert model not in module._JOINED

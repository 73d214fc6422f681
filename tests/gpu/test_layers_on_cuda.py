"""The kernels of layers on CUDA (`make test-gpu`); skipped where there is none."""

import pytest
import torch
from architectures import tiny_model
from layer_kernel_cases import cases

from gspo.kernels import norm_gate_rotary, write_tokens
from gspo.kernels.dispatch import choose
from gspo.models.kernel_layers import layer_kernels_enabled
from gspo.rollout import shared_products

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 3, 2, 5, 5]])


def test_as_near_to_float64_as_plain_pytorch(poisoned):
    x = torch.zeros(1, device="cuda")
    assert choose(norm_gate_rotary.IMPLEMENTATIONS, x).__name__ == "gspo.kernels.norm_gate_rotary_triton"
    assert choose(write_tokens.IMPLEMENTATIONS, x).__module__ == "gspo.kernels.write_tokens_triton"
    wrong = [f"{name}: {line}" for name, compare in cases("cuda") for line in compare()]
    assert not wrong, "\n".join(wrong)


def numbers_of(model):
    """Logits and all gradients."""
    model.zero_grad()
    logits = model(input_ids=IDS.to("cuda")).logits
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "gemma2", "olmo2", "deepseek_v3"])
def test_whole_models_have_transformers_numbers_and_gradients(family):
    model = tiny_model(family).to("cuda")
    theirs = numbers_of(model)
    with layer_kernels_enabled():
        ours = numbers_of(model)
    assert any(not a.equal(b) for a, b in zip(ours, theirs, strict=True)), "other roundings"
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.cpu(), plain.cpu(), rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


def test_whole_models_under_autocast_round_where_the_next_product_would():
    """But not the last hidden states, which feed the head."""
    model, seen = tiny_model("qwen3").to("cuda"), {}
    with torch.autocast("cuda", torch.bfloat16), layer_kernels_enabled():
        for name, m in model.named_modules():
            if name.endswith("norm"):
                m.register_forward_hook(lambda m, given, out, name=name: seen.update({name: out.dtype}))
        model(input_ids=IDS.to("cuda"))
    assert seen.pop("model.norm") == torch.float32
    assert len(seen) == 6 and set(seen.values()) == {torch.bfloat16}  # the second norm of a layer is part of its sum


def test_whole_models_have_their_weights_joined_once():
    model, device = tiny_model("llama").to("cuda"), torch.device("cuda", 0)
    before = [p.clone() for p in model.parameters()]
    for _ in range(2):
        shared_products.join_weights(model, device)
        joined = shared_products._JOINED[model]
        assert len(joined) == 4 and all(product.holds() for product in joined)
    assert all(a.equal(b) for a, b in zip(model.parameters(), before, strict=True))
    shared_products.join_weights(model.bfloat16(), device)  # which moves them
    assert shared_products._JOINED[model] is not joined

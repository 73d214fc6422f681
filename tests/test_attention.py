"""Which models packed rows serve exactly, and that the others are refused by name."""

import pytest
import torch
from architectures import FAMILIES, SMALL, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from gspo.attention import PACKED, attention_of
from gspo.decode_attention import check_slots
from gspo.errors import UserError
from gspo.head import measure_head
from gspo.logprobs import check_packing
from gspo.slots import Step

CPU = torch.device("cpu")

HYBRID = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
REFUSED = {
    "gpt_oss": ({"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, "attention sinks"),
    "llama4_text": ({"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32}, "chunked_attention"),
    "qwen3_next": (HYBRID, "linear_attention"),
    "qwen2_moe": ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "num_experts": 4,
                   "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}, "sliding window"),
    "gemma3_text": ({"head_dim": 8, "use_bidirectional_attention": True}, "both directions"),
    "bloom": ({"n_head": 4}, "apart"),
    "stablelm": ({}, "no extra arguments"),
    "mamba": ({"state_size": 4}, ""),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_full_and_sliding_attention_pass(family):
    model = tiny_model(family)
    before = model.config._attn_implementation
    check_packing(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("check", [check_packing, lambda model: check_slots(model, CPU)], ids=["packs", "slots"])
@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_would_get_other_log_probs_is_refused_by_name(family, check):
    extra, why = REFUSED[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **extra})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.measured_head = measure_head(model)
    if check is not check_packing and family == "bloom":
        why = ""  # its positions are its own, which slots show in another way
    with pytest.raises(UserError, match=rf"{family}.*{why}"):
        check(model)


@pytest.mark.parametrize("wrong", ["position_ids", "slots"])
def test_slots_are_compared_with_plain_forwards(wrong, monkeypatch):
    """A model that is given positions one too high, or that forgets half of what it saw, does not pass."""
    model, forward = tiny_model("llama"), LlamaForCausalLM.forward

    def other(self, *args, **given):
        if wrong == "position_ids" and "slots" in given:
            given["position_ids"] = given["position_ids"] * 2
        if wrong == "slots" and isinstance(given.get("slots"), Step):
            given["slots"].answer_start.add_(1)
        return forward(self, *args, **given)

    check_slots(model, CPU)
    monkeypatch.setattr(LlamaForCausalLM, "forward", other)
    with pytest.raises(UserError, match="llama.*one token at a time"):
        check_slots(model, CPU)


def test_the_models_own_attention_returns_even_after_a_fault():
    config = tiny_model("llama").config
    with pytest.raises(ZeroDivisionError), attention_of(config, PACKED):
        assert config._attn_implementation == PACKED
        raise ZeroDivisionError
    assert config._attn_implementation == "sdpa"

"""Which models packed rows serve exactly, and that the others are refused by name."""

import copy

import pytest
import torch
from architectures import FAMILIES, SMALL, tiny_model
from tiny_sampler import prompts_of, sampler_for
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from gspo.errors import UserError
from gspo.models.attention_support import attention_implementation, check_length
from gspo.models.loading import cast_parameters
from gspo.packing.logprobs import check_packing, response_logprobs
from gspo.packing.pack import pack_rows
from gspo.packing.packed_attention import PACKED
from gspo.packing.probe_head import measure_head
from gspo.rollout.attention_inputs import Step
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.slot_attention import check_slots

CPU = torch.device("cpu")

HYBRID = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
REFUSED = {
    "gpt_oss": ({"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, "attention sinks"),
    "llama4_text": ({"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32}, "chunked_attention"),
    "qwen3_next": (HYBRID, "linear_attention"),
    "qwen2_moe": ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "num_experts": 4,
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
    check_packing(model, measure_head(model))
    assert model.config._attn_implementation == before


@pytest.mark.bf16
@pytest.mark.parametrize("family", FAMILIES)
def test_models_wholly_in_bf16_pass_as_ranks_run_them(family):
    """Without autocast a projection wants its inputs in its own type, whatever attention computes in."""
    model = tiny_model(family)
    head = measure_head(model)
    check_packing(cast_parameters(model, torch.bfloat16), head)


CHECKS = {
    "packs": lambda model: check_packing(model, measure_head(model)),
    "slots": lambda model: check_slots(model, CPU),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_would_get_other_log_probs_is_refused_by_name(family, check):
    extra, why = REFUSED[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **extra})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if check == "slots" and family == "bloom":
        why = ""  # its positions are its own, which slots show in another way
    with pytest.raises(UserError, match=rf"{family}.*{why}"):
        CHECKS[check](model)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = MOE | {"shared_expert_intermediate_size": 16}
NO_WINDOW = {  # a window is named, and no layer has it, or every layer that has it says so to its attention
    "experts, switched off": ("qwen2_moe", SHARED | {"use_sliding_window": False, "sliding_window": 4}),
    "experts, switched off, of the default length": ("qwen2_moe", SHARED),
    "experts, on for no layer": (
        "qwen2_moe",
        SHARED | {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"] * 2},
    ),
    "newer experts, switched off": ("qwen3_moe", MOE | {"use_sliding_window": False, "sliding_window": 4}),
    "newer experts, on": ("qwen3_moe", MOE | {"use_sliding_window": True, "sliding_window": 4}),
    "mixtral's": ("mixtral", {"num_local_experts": 4, "sliding_window": 4}),
    "dense, switched off": ("qwen2", {"use_sliding_window": False, "sliding_window": 4}),
    "dense, on for later layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
}


@pytest.mark.parametrize("case", NO_WINDOW)
def test_windows_are_measured_and_not_looked_up(case):
    family, extra = NO_WINDOW[case]
    model = tiny_model(family, **extra)
    for check in CHECKS.values():
        check(model)


def test_a_window_of_zero_tokens_is_none():
    """As some configurations write it, when it reaches our attention."""
    model = tiny_model("mistral", sliding_window=None)
    rollout = sampler_for(model).generate(prompts_of((3, 5)), 2, Sampling(max_new_tokens=4))
    packed = pack_rows(rollout, [(0, 0), (0, 1), (1, 0), (1, 1)])
    wanted = response_logprobs(model, None, packed, 1.0)
    model.config.sliding_window = 0
    assert response_logprobs(model, None, packed, 1.0).equal(wanted)


@pytest.mark.parametrize("length", [3, 4, 4096])
def test_a_window_that_attention_is_not_told_of_is_found_however_long_it_is(length):
    """The trial has six tokens."""
    extra = SHARED | {"use_sliding_window": True, "sliding_window": length, "max_window_layers": 2}
    model = tiny_model("qwen2_moe", **extra)
    for check in CHECKS.values():
        with pytest.raises(UserError, match="qwen2_moe, keeps its sliding window from its attention function, or"):
            check(model)
    assert model.config.sliding_window == length


@pytest.mark.parametrize("wrong", ["position_ids", "slots"])
def test_slots_are_compared_with_plain_forwards(wrong, monkeypatch):
    """A model that is given positions one too high, or that forgets half of what it saw, does not pass."""
    model, forward = tiny_model("llama"), LlamaForCausalLM.forward

    def other(self, *args, **given):
        if wrong == "position_ids" and "slots" in given:
            given["position_ids"] = given["position_ids"] * 2
        if wrong == "slots" and isinstance(given.get("slots"), Step):
            given["slots"].prompt_sizes.floor_divide_(2)
        return forward(self, *args, **given)

    check_slots(model, CPU)
    monkeypatch.setattr(LlamaForCausalLM, "forward", other)
    with pytest.raises(UserError, match="llama.*one token at a time"):
        check_slots(model, CPU)


def test_the_models_own_attention_returns_even_after_a_fault():
    config = tiny_model("llama").config
    with pytest.raises(ZeroDivisionError), attention_implementation(config, PACKED):
        assert config._attn_implementation == PACKED
        raise ZeroDivisionError
    assert config._attn_implementation == "sdpa"


# ---- rotary frequencies chosen by the longest sequence of a forward ----

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 24,
            "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
BY_LENGTH = {
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 24}),
    "longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "max_position_embeddings": 96, "original_max_position_embeddings": 24},
    ),
    "of some layers": (
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": LONGROPE, "sliding_attention": PLAIN},
            "layer_types": ["full_attention", "sliding_attention"],
            "max_position_embeddings": 96,
        },
    ),
}


def by_length(case):
    family, extra = BY_LENGTH[case]
    return tiny_model(family, **copy.deepcopy(extra))  # transformers writes into what it is given


def alone(model, rollout, g, i):
    """Log-probs of one answer, by a forward of its own."""
    answer = rollout.tokens[g, i, : rollout.lengths[g, i]]
    ids = torch.tensor([[*rollout.prompts[g].ids, *answer.tolist()]])
    logits = model(input_ids=ids).logits[0, ids.shape[1] - len(answer) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("case", BY_LENGTH)
def test_frequencies_chosen_by_length_are_served_exactly_up_to_where_they_change(case):
    model = by_length(case)
    sampler = sampler_for(model, max_slots=4)
    sampler.end_ids = {-1}  # every answer is as long as may be
    rollout = sampler.generate(prompts_of((3, 12, 7)), 2, Sampling(1.0, max_new_tokens=12))
    rows = [(g, i) for g in range(3) for i in range(2)]
    packed = response_logprobs(model, measure_head(model), pack_rows(rollout, rows), 1.0)
    assert rollout.longest == 24
    for logprobs, (g, i) in zip(packed, rows, strict=True):
        torch.testing.assert_close(logprobs, alone(model, rollout, g, i), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rollout.logprobs[g, i], logprobs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", BY_LENGTH)
def test_and_are_refused_by_name_beyond_as_a_longer_batch_mate_would_change_a_response(case, monkeypatch):
    model = by_length(case)
    sampler, sampling = sampler_for(model), Sampling(1.0, max_new_tokens=12)
    kind = "dynamic" if case == "dynamic" else "longrope"
    said = rf"25 tokens.*24.*{model.config.model_type}.*{kind}.*within 24.*rollout.max_new_tokens"
    with pytest.raises(UserError, match=said):
        sampler.generate(prompts_of((3, 13)), 2, sampling)
    monkeypatch.setattr("gspo.rollout.sampler.check_length", lambda *_: None)
    sampler.end_ids = {-1}
    rollout = sampler.generate(prompts_of((3, 13)), 1, sampling)
    both = response_logprobs(model, measure_head(model), pack_rows(rollout, [(0, 0), (1, 0)]), 1.0)
    assert (both[0] - alone(model, rollout, 0, 0)).abs().max() > 1e-2


@pytest.mark.parametrize("rope", [PLAIN, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}], ids=str)
def test_other_frequencies_have_no_limit(rope):
    check_length(tiny_model("llama", rope_parameters=rope, max_position_embeddings=24).config, 10**6)
    check_length(AutoConfig.for_model("bloom"), 10**6)


def test_a_soft_cap_that_the_loaded_attention_drops_is_no_reason_to_refuse_a_model():
    """transformers 5.17 loads Gemma 2 with `sdpa`, which leaves its soft cap out there, and is an error in 5.23."""
    model = tiny_model("gemma2", attn_logit_softcapping=0.5)
    model.config._attn_implementation = "sdpa"
    check_packing(model, measure_head(model))
    check_slots(model, CPU)
    assert model.config._attn_implementation == "sdpa"

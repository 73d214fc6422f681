"""Tiny random models of the families people bring, in fp32."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gspo.models.kernel_layers import install_layer_kernels

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
EXTRA = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 6},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 24,
    },
}
FAMILIES = list(EXTRA)

IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}  # as deep as the decoder of text
COMPOSITE = {  # a text_config inside, and with most of them a tower for images
    "gemma3": {"text_config": SMALL | EXTRA["gemma3_text"], "vision_config": IMAGES},
    "gemma4": {
        "text_config": SMALL | EXTRA["gemma3_text"] | {"global_head_dim": 8, "hidden_size_per_layer_input": 0,
                                                       "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 97},
        "vision_config": IMAGES | {"head_dim": 8},
    },
    "got_ocr2": {
        "text_config": SMALL | {"model_type": "qwen2"},
        "vision_config": IMAGES | {"output_channels": 16, "mlp_dim": 16, "global_attn_indexes": [1], "window_size": 2},
    },
    "fuyu": {"text_config": SMALL | {"model_type": "persimmon"}},
    "qwen3_5": {"text_config": SMALL | {"head_dim": 8, "layer_types": ["full_attention"] * 2}},
}  # fmt: skip


def tiny_model(family: str, seed: int = 0, **extra: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    given = COMPOSITE.get(family) or SMALL | EXTRA.get(family, {})
    config = AutoConfig.for_model(family, **given | extra)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # larger than at initialisation, so that log-probs differ between tokens
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8.0)
        if (bias := model.get_output_embeddings().bias) is not None:  # zero at initialisation
            bias.normal_()
    return install_layer_kernels(model.float().eval())

"""Whether a model's attention is one that ours serves exactly, and ours in its place for some forwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from gspo.errors import UserError
from gspo.models.compiled_layers import fused_layers

EXACT_LAYERS = {"full_attention", "sliding_attention"}


def refuse_unknown(module: nn.Module, state: object | None, options: dict[str, Any]) -> None:
    """UserError where a module asks for more than causal attention, or does not pass our `state` on."""
    config = module.config
    if state is None:
        raise refusal(config, "hands no extra arguments to its attention")
    if any(options.get(name) is not None for name in ("s_aux", "position_bias", "cache")):
        raise refusal(config, "adds attention sinks or biases of its own")
    if not getattr(module, "is_causal", True):
        raise refusal(config, "attends in both directions")
    if "sliding_window" not in options and getattr(config, "sliding_window", None) is not None:
        raise refusal(config, "keeps its sliding window from its attention function")


def refusal(config: PreTrainedConfig, why: str) -> UserError:
    return UserError(
        f"model.path: this model's architecture, {config.model_type}, {why}, and our attention would give it other "
        "log-probs than its own; choose a decoder with causal attention, full or by sliding windows."
    )


def check_architecture(config: PreTrainedConfig) -> None:
    """UserError where the configuration already says that a model's layers are not such attention."""
    others = set(getattr(config.get_text_config(), "layer_types", None) or ()) - EXACT_LAYERS
    if others:
        raise refusal(config, f"has layers of the kind {', '.join(sorted(others))}")


def ordinary_token(config: PreTrainedConfig) -> int:
    """The first of ten tokens to try a model with. Behind special tokens half precision can be chaos: SmolLM2's logits
    in bf16 are off by a quarter there, and by a twentieth behind these."""
    return (config.get_text_config().vocab_size - 10) // 3


def check_length(config: PreTrainedConfig, tokens: int) -> None:
    """UserError where a prompt and its answer, `tokens` together, reach positions at which a model's rotary frequencies
    depend on the forward that they are in.

    Beyond a length, transformers chooses those of dynamic NTK and LongRoPE for all rows by the largest position
    (modeling_rope_utils.py, `dynamic_rope_update`): log-probs would change with batch mates and with how a batch is
    cut, and the keys that a sampler keeps would not be those of a later forward.
    """
    c = config.get_text_config()
    ropes = getattr(c, "rope_parameters", None) or {}
    for rope in [ropes] if "rope_type" in ropes else ropes.values():  # of all layers, or by the kind of layer
        kind = rope["rope_type"]
        if "dynamic" not in kind and kind != "longrope":
            continue
        limit = rope["original_max_position_embeddings"] if kind == "longrope" else c.max_position_embeddings
        if tokens > limit:
            raise UserError(
                f"a prompt and its answer may have {tokens:,} tokens together. Beyond {limit:,} this model's positions "
                f"({c.model_type}, rope_type {kind!r}) are scaled by the longest sequence of a batch, and an answer "
                f"would depend on its batch mates. Keep the two within {limit:,} (data.max_prompt_length and "
                "rollout.max_new_tokens; with spin, the rows' solutions), or choose a model of another rope_type."
            )


@contextmanager
def attention_of(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Attention by the function registered as `name`, and compiled layers (compiled_layers.py), for the forwards
    inside."""
    before, config._attn_implementation = config._attn_implementation, name
    try:
        with fused_layers():
            yield
    finally:
        config._attn_implementation = before

"""Refuse models whose attention ours does not compute; switch ours on inside a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from gspo.errors import UserError
from gspo.models.kernel_layers import layer_kernels_enabled
from gspo.models.patching import replaced

SHORT = 2  # tokens that a sliding window has while a model is tried
EXACT_LAYERS = {"full_attention", "sliding_attention"}


def check_attention_arguments(module: nn.Module, state: object | None, options: dict[str, Any]) -> None:
    """Raise UserError where an attention module wants more than causal attention, or drops `state`, our argument."""
    config = module.config
    if state is None:
        raise unsupported_model(config, "hands no extra arguments to its attention")
    if any(options.get(name) is not None for name in ("s_aux", "position_bias", "cache")):
        raise unsupported_model(config, "adds attention sinks or biases of its own")
    if not getattr(module, "is_causal", True):
        raise unsupported_model(config, "attends in both directions")


def unsupported_model(config: PreTrainedConfig, why: str) -> UserError:
    """Return the error that says why a model cannot be trained or sampled here."""
    return UserError(
        f"model.path: this model's architecture, {config.model_type}, {why}, and our attention would give it other "
        "log-probs than its own; choose a decoder with causal attention, full or by sliding windows."
    )


def check_architecture(config: PreTrainedConfig) -> None:
    """Raise UserError where the configuration names layers that are neither full nor sliding-window attention."""
    others = set(getattr(config.get_text_config(), "layer_types", None) or ()) - EXACT_LAYERS
    if others:
        raise unsupported_model(config, f"has layers of the kind {', '.join(sorted(others))}")


@contextmanager
def short_windows(model: nn.Module) -> Iterator[str]:
    """Give every sliding window of a model SHORT tokens inside -> what a wrong result may come from, in words.

    So a trial of a few tokens shows whether our attention is told of the windows, however long they are: a
    configuration may name a window that no layer has.
    """
    owners = {id(x): x for m in model.modules() for x in (m, getattr(m, "config", None)) if x is not None}
    owners |= {id(config := model.config.get_text_config()): config}
    windows = [(x, name) for x in owners.values() for name in vars(x) if name.endswith(("window", "window_size"))]
    windows = [(x, name) for x, name in windows if type(getattr(x, name)) is int and getattr(x, name) > SHORT]
    with replaced([(x, name, SHORT) for x, name in windows]):
        yield "keeps its sliding window from its attention function, or " if windows else ""


def ordinary_token(config: PreTrainedConfig) -> int:
    """Return the first of ten ordinary tokens to try a model with.

    After special tokens half precision can be chaos: SmolLM2's logits in bf16 are off by a quarter there, and by a
    twentieth after these.
    """
    return (config.get_text_config().vocab_size - 10) // 3


def check_length(config: PreTrainedConfig, tokens: int) -> None:
    """Raise UserError where sequences of `tokens`, prompt and response, have positions that depend on their batch.

    Beyond a length, transformers chooses the rotary frequencies of dynamic NTK and LongRoPE for all rows by the largest
    position of the forward (modeling_rope_utils.py, `dynamic_rope_update`): log-probs would change with batch mates
    and with how a batch is cut, and the sampler's cached keys would not be those of a later forward.
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
                f"a prompt and its response may have {tokens:,} tokens together. Beyond {limit:,} this model's "
                f"positions ({c.model_type}, rope_type {kind!r}) are scaled by the longest sequence of a batch, and a "
                f"response would depend on its batch mates. Keep the two within {limit:,} (data.max_prompt_length and "
                "rollout.max_new_tokens; with spin, the rows' solutions), or choose a model of another rope_type."
            )


@contextmanager
def plain_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Use transformers' own attention, written out, for the forwards inside that ours is compared with.

    What it loads a model with may leave something out: up to transformers 5.17 `sdpa` drops Gemma 2's soft cap.
    """
    with replaced([(config.get_text_config(), "_attn_implementation", "eager")]):
        yield


@contextmanager
def attention_implementation(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Use the attention function registered as `name`, and the kernels of layers, for the forwards inside."""
    with replaced([(config, "_attn_implementation", name)]), layer_kernels_enabled():
        yield

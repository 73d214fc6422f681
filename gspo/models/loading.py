"""Open transformers causal language models and tokenizers, the same way for policy, sampler and reference."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from gspo.embedded import MODEL_DIR
from gspo.errors import UserError
from gspo.models.architecture import attention_implementation
from gspo.models.compiled_layers import install_compiled_layers
from gspo.models.patching import replace

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()


def resolve_path(path: str | None) -> str:
    """Return the folder or hub name to load; the embedded model where none is named."""
    return str(MODEL_DIR) if path is None else str(path)


def cannot_open(path: str, error: Exception) -> UserError:
    """Return the error that names `path` and why transformers or the hub could not open it."""
    reason = " ".join(str(error).split())[:300].rstrip(".")
    what = "cannot be opened as a model folder" if Path(path).exists() else "is no folder here and cannot be fetched"
    return UserError(f"model.path = {path!r} {what}: {reason}. Give a Hugging Face folder or name, or leave it empty.")


def load_model(path: str | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a causal language model on the CPU, in `dtype` and in eval mode. Raises UserError where it cannot be opened.

    It stays in eval mode: a policy trained with dropout would not be the one that samples.
    """
    name = resolve_path(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as e:  # transformers and the hub raise a dozen kinds
        raise cannot_open(name, e) from e
    model.config.use_cache = False
    return install_compiled_layers(model.eval())


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model's parameters, but not its buffers: rotary frequencies in bf16 would be another model's."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def load_tokenizer(path: str | None) -> Any:
    """Load a model's fast tokenizer. Raises UserError where it cannot be opened."""
    name = resolve_path(path)
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as e:
        raise cannot_open(name, e) from e


def end_and_pad_ids(model: nn.Module, tokenizer: Any) -> tuple[set[int], int]:
    """Return (ids of all tokens that end a response, id of the padding token).

    Collected from generation_config, config and tokenizer. Raises UserError where none of them names an end token.
    """
    ends: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ends |= set(value) if isinstance(value, list | tuple) else {value} if value is not None else set()
    if not ends:
        raise UserError("the model names no end-of-sequence token: set eos_token_id in its generation_config.json.")
    pad = tokenizer.pad_token_id
    return ends, min(ends) if pad is None else pad


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers, which are sharded and checkpointed one by one."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers]
    assert stacks, f"no stack of {model.config.num_hidden_layers} layers in {type(model).__name__}"
    return stacks[0]


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    config = model.config.get_text_config()

    def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """For the first computation and for the one in the backward pass, which must use the same attention."""
        return contextlib.nullcontext(), attention_implementation(config, config._attn_implementation)

    for layer in decoder_layers(model):
        recomputed = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
        replace(layer, "forward", recomputed)


def load_model_config(path: str | None) -> Any:
    """Load a model's configuration alone. Raises UserError where it cannot be opened."""
    name = resolve_path(path)
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as e:
        raise cannot_open(name, e) from e


def architecture(folder: str) -> dict[str, Any]:
    """Return what two models must have in common for the weights of one to fit the other."""
    c = load_model_config(folder).get_text_config()
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return {name: getattr(c, name, None) for name in names}

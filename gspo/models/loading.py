"""Policies, samplers and references: transformers causal language models, opened the same way everywhere."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from gspo.embedded import MODEL_DIR
from gspo.errors import UserError
from gspo.models.architecture import attention_of
from gspo.models.compiled_layers import fuse

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()


def resolve_path(path: str | None) -> str:
    """The folder or hub name to load; the embedded model where none is named."""
    return str(MODEL_DIR) if path is None else str(path)


def refuse(path: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300].rstrip(".")
    what = "cannot be opened as a model folder" if Path(path).exists() else "is no folder here and cannot be fetched"
    return UserError(f"model.path = {path!r} {what}: {reason}. Give a Hugging Face folder or name, or leave it empty.")


def load_model(path: str | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A causal LM on the CPU, in `dtype`, in eval mode, where it stays: a policy trained with dropout would not be
    the one that samples. Raises UserError when it cannot be had."""
    name = resolve_path(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as e:  # transformers and the hub raise a dozen kinds
        raise refuse(name, e) from e
    model.config.use_cache = False
    return fuse(model.eval())


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Its parameters cast, not its buffers: rotary frequencies in bf16 would be another model's."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def load_tokenizer(path: str | None) -> Any:
    """The model's fast tokenizer. Raises UserError when it cannot be had."""
    name = resolve_path(path)
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as e:
        raise refuse(name, e) from e


def generation_ids(model: nn.Module, tokenizer: Any) -> tuple[set[int], int]:
    """(every id that ends an answer, the padding id), from generation_config, config and tokenizer together."""
    ends: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ends |= set(value) if isinstance(value, list | tuple) else {value} if value is not None else set()
    if not ends:
        raise UserError("the model names no end-of-sequence token: set eos_token_id in its generation_config.json.")
    pad = tokenizer.pad_token_id
    return ends, min(ends) if pad is None else pad


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers: what is sharded and checkpointed one by one."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers]
    assert stacks, f"no stack of {model.config.num_hidden_layers} layers in {type(model).__name__}"
    return stacks[0]


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    config = model.config.get_text_config()

    def as_first_computed() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        return contextlib.nullcontext(), attention_of(config, config._attn_implementation)

    for layer in decoder_layers(model):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, context_fn=as_first_computed)


def load_model_config(path: str | None) -> Any:
    """The model's configuration alone. Raises UserError when it cannot be had."""
    name = resolve_path(path)
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as e:
        raise refuse(name, e) from e


def architecture(folder: str) -> dict[str, Any]:
    """What two models must share for one's weights to fit the other."""
    c = load_model_config(folder).get_text_config()
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return {name: getattr(c, name, None) for name in names}

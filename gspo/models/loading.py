"""Open transformers causal language models and tokenizers, the same way for policy, sampler and reference."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from gspo.errors import UserError
from gspo.models.attention_support import attention_implementation
from gspo.models.generation import end_ids_of, read_generation_config
from gspo.models.kernel_layers import install_layer_kernels
from gspo.models.model_folder import (
    cannot_open,
    check_folder,
    check_tokenizer_files,
    needs_own_code,
    own_code,
    resolve_path,
    wrong_folder,
)
from gspo.models.patching import replace
from gspo.models.safetensors_files import open_weights, stored_folder
from gspo.models.stored_weights import (
    Differences,
    check_stored,
    refuse_differences,
    refuse_non_finite,
    state_of,
    two_heads,
)
from gspo.read_paths import require_file

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()


def load_model(path: str | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a causal language model on the CPU, in `dtype` and in eval mode. Raises UserError where it cannot be opened.

    It stays in eval mode: a policy trained with dropout would not be the one that samples.
    """
    name = resolve_path(path)
    check_weights(path)
    fetched = stored_folder(name) is not None
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=load_model_config(path),
            generation_config=read_generation_config(name),
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=Path(name).exists(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except Exception as e:  # transformers and the hub raise a dozen kinds
        raise cannot_open(name, e) from e
    if not fetched:
        _check_loaded(name, model, info)
    refuse_non_finite(name, state_of(model))
    model.config.use_cache = False
    return install_layer_kernels(model.eval())


def _check_loaded(name: str, model: nn.Module, info: dict[str, Any]) -> None:
    """Check weights that could not be looked at before: fetched from the hub just now, or pickled."""
    shapes = {tensor: (tuple(stored), tuple(wanted)) for tensor, stored, wanted in sorted(info["mismatched_keys"])}
    refuse_differences(name, model, Differences(info["missing_keys"], info["unexpected_keys"], shapes))
    if folder := stored_folder(name):
        check_stored(name, model, open_weights(folder))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    if not tied and getattr(model.config, "tie_word_embeddings", False):
        raise two_heads(name)


def model_without_weights(path: str | None) -> nn.Module:
    """Build the causal LM at `path` on the meta device, with its generation config. Only small files are read."""
    config, generation = load_model_config(path), read_generation_config(resolve_path(path))
    with torch.device("meta"):
        model = build_model(config, resolve_path(path))
    if generation is not None:
        end_ids_of(generation, "generation_config.json", config.get_text_config().vocab_size)
        model.generation_config = generation
    return model


def build_model(config: Any, name: str, **options: Any) -> nn.Module:
    """Build the causal LM of a configuration, without weights. UserError where its class cannot be built here."""
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    except Exception as e:  # packages that are not installed, sizes that do not fit each other
        raise cannot_open(name, e) from e


def check_weights(path: str | None, values: bool = False, required: bool = True) -> None:
    """Raise UserError unless the files of a model hold its weights; with `values`, finite ones.

    Not `required`: a folder without any passes. What is on the hub and has not been fetched, and pickled weights, are
    looked at when they are opened.
    """
    name = resolve_path(path)
    model, folder = model_without_weights(path), stored_folder(name)
    if folder is None:
        if required and Path(name).is_dir() and not [*Path(name).glob("pytorch_model*.bin")]:
            raise wrong_folder(name, "has no weights: no model.safetensors, nor an index of such files. Fetch them.")
        return
    weights = open_weights(folder)
    check_stored(name, model, weights)
    if values:
        refuse_non_finite(name, ((tensor, partial(weights.read, tensor)) for tensor in weights.names))


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model's parameters, but not its buffers: rotary frequencies in bf16 would be another model's."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def load_tokenizer(path: str | None, chat_template: str | None = None) -> Any:
    """Load a model's fast tokenizer; `chat_template` is a file with one instead of its own, and is saved with it.

    Raises UserError where either cannot be opened.
    """
    name = resolve_path(path)
    template = None if chat_template is None else read_template(chat_template)
    check_tokenizer_files(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=Path(name).exists())
    except Exception as e:
        if code := own_code(name, "tokenizer_config.json", "AutoTokenizer"):
            raise needs_own_code(name, code) from e
        raise _no_tokenizer(name, e) from e
    if not getattr(tokenizer, "vocab_size", 1):
        raise _no_tokenizer(name, "its vocabulary is empty")
    if template is not None:
        tokenizer.chat_template = template
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        except Exception as e:  # of what else it may refuse the prompts will tell
            if type(e).__name__ == "TemplateSyntaxError":
                raise UserError(
                    f"data.chat_template = {chat_template!r}, line {e.lineno}: no Jinja template: {e}"
                ) from e
    return tokenizer


def read_template(path: str) -> str:
    """Read a chat template from a file. UserError where it cannot be one."""
    place = f"data.chat_template = {path!r}"
    try:
        require_file(Path(path), "data.chat_template")
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"{place}: {getattr(e, 'strerror', None) or 'it is not UTF-8 text'}. Give a file with a Jinja template, "
            "such as a model's chat_template.jinja."
        ) from e
    if "messages" not in text:
        raise UserError(f"{place} never reads `messages`, so no prompt would be shown. Give a chat template of Jinja.")
    return text


def _no_tokenizer(name: str, why: Exception | str) -> UserError:
    """Return the error of a tokenizer that transformers cannot make from a model's files."""
    reason = " ".join(str(why).split())[:200].rstrip(".")
    return wrong_folder(
        name,
        f"has no tokenizer that transformers can open: {reason}. Copy the tokenizer's files (tokenizer.json, "
        "tokenizer_config.json) of the model that these weights come from into it.",
    )


def end_and_pad_ids(model: nn.Module, tokenizer: Any) -> tuple[set[int], int]:
    """Return (ids of all tokens that end a response, id of the padding token).

    Collected from generation_config, config and tokenizer. Raises UserError where none of them names an end token.
    """
    ends: set[int] = set()
    for source, place in (
        (model.generation_config, "generation_config.json"),
        (model.config, "config.json"),
        (model.config.get_text_config(), "config.json"),
        (tokenizer, "tokenizer_config.json"),
    ):
        ends |= end_ids_of(source, place, model.config.get_text_config().vocab_size)
    if not ends:
        raise UserError("the model names no end-of-sequence token: set eos_token_id in its generation_config.json.")
    pad = tokenizer.pad_token_id
    return ends, min(ends) if pad is None else pad


def text_decoder(model: nn.Module) -> nn.Module:
    """Return the part of a model that decodes text: the base model, or what it holds beside towers for images."""
    try:
        return model.get_decoder()
    except (AttributeError, NotImplementedError):
        return model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers, which are sharded and checkpointed one by one.

    Of lists of the right length in the text decoder they are the one with most parameters: a tower for images may be as
    deep, and a layer may have as many experts. UserError where there is none.
    """
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    lists = [m for m in text_decoder(model).modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise UserError(
            f"model.path: {type(model).__name__} ({config.model_type}) has no list of {count} decoder layers, so it "
            "can neither be sharded over several processes nor recompute activations layer by layer. Train it on one "
            "process with model.gradient_checkpointing=false, or choose another model."
        )
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def recomputes_activations(gradient_checkpointing: bool | Literal["auto"], device: str) -> bool:
    """Decide the setting for a device, cpu or cuda."""
    return device == "cuda" if gradient_checkpointing == "auto" else gradient_checkpointing


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
    check_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=Path(name).exists())
    except Exception as e:
        if code := own_code(name, "config.json", "AutoConfig"):
            raise needs_own_code(name, code) from e
        if not Path(name).exists():
            with contextlib.suppress(Exception):  # a name on the hub without config.json may be an adapter
                hf_hub_download(name, "adapter_config.json")
            check_folder(name)
        raise cannot_open(name, e) from e
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise wrong_folder(
            name,
            f"is of the type {config.model_type}, for which transformers has no causal language model. Choose a "
            "decoder that continues a text.",
        )
    return config


def architecture(folder: str) -> dict[str, Any]:
    """Return what two models must have in common for the weights of one to fit the other."""
    c = load_model_config(folder).get_text_config()
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return {name: getattr(c, name, None) for name in names}

"""Build a model on the meta device, shard it, and read each rank's part of every weight from its safetensors files.

Weights are read tensor by tensor, and of each tensor only the slices that a rank holds, so no rank ever has the whole
model.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightTransform, rename_source_key

from gspo.distributed.transfer import ReadSlices, fill_weights
from gspo.errors import UserError
from gspo.models.compiled_layers import install_compiled_layers
from gspo.models.loading import cannot_open, cast_parameters, load_model_config, resolve_path
from gspo.models.patching import replaced
from gspo.models.safetensors_files import Weights, open_weights

NamesOfPattern = dict[str, list[str]]  # a pattern of transformers' weight conversion -> the stored tensors it matches
Sources = dict[str, tuple[WeightConverter | None, NamesOfPattern]]  # a tensor's name in the model -> what makes it


def meta_model(path: str | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build the causal LM at `path` as `load_model` does, but with its parameters, of `dtype`, on the meta device.

    Buffers have storage: rotary frequencies are in no file, and are computed while the model is built. Only config.json
    is read. UserError when there is none.
    """
    config = load_model_config(path)
    with replaced([(nn.Module, "register_parameter", _register_on_meta)]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with contextlib.suppress(OSError):  # not every model has one
        model.generation_config = GenerationConfig.from_pretrained(resolve_path(path))
    model.config.use_cache = False
    return cast_parameters(install_compiled_layers(model.eval()), dtype)


_register_parameter = nn.Module.register_parameter


def _register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """Register a parameter on the meta device: its storage is freed before anything is written to it."""
    if param is not None and not param.is_meta:
        param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
    _register_parameter(module, name, param)


def local_folder(path: str | None) -> Path:
    """Return the folder of a model, downloaded where `path` is a name on the hub. UserError when that fails."""
    name = resolve_path(path)
    if Path(name).exists():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as e:  # the hub raises a dozen kinds
        raise cannot_open(name, e) from e


def named_weights(model: nn.Module, path: str | None) -> Iterator[tuple[str, ReadSlices]]:
    """Yield (name in the model's state_dict, function that reads slices of it) for every stored tensor the model has.

    Of a tied pair both names come, if the files have both. A tensor that transformers stores in another form than its
    modules hold (experts one by one) is assembled whole, one such tensor at a time, and then sliced.
    """
    weights = open_weights(local_folder(path))
    return _read(model, weights, _sources(model, weights, get_model_conversion_mapping(model)))


def _read(model: nn.Module, weights: Weights, sources: Sources) -> Iterator[tuple[str, ReadSlices]]:
    """Yield each tensor that `_sources` found: straight from its file, or converted."""
    for name, (converter, stored_names) in sources.items():
        if converter is None:
            (stored,) = stored_names
            yield name, lambda slices, stored=stored: weights.read(stored, slices)
            continue
        for pattern, matching in stored_names.items():
            for stored in matching:
                converter.add_tensor(name, stored, pattern, weights.read(stored))
        for target, full in converter.convert(name, model=model, config=model.config).items():
            full = full[0] if isinstance(full, list) else full
            yield target, lambda slices, full=full: full[slices]


def _sources(model: nn.Module, weights: Weights, mapping: list[WeightTransform]) -> Sources:
    """Find what each tensor of the model is made of: a stored tensor as it is (no converter), or several, converted.

    A converter that makes several tensors stands under the name of the first.
    """
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in mapping if not isinstance(transform, WeightConverter)]
    known, prefix = model.state_dict(keep_vars=True), model.base_model_prefix
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: Sources = {}
    for stored in sorted(weights.names, key=_natural_order):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
        if name not in known and stored in known:
            name, pattern = stored, None
        if name not in known:
            continue
        if pattern is None:
            found[name] = None, {stored: [stored]}
        else:
            _, stored_names = found.setdefault(name, (copy.deepcopy(converter_of[pattern]), {}))
            stored_names.setdefault(pattern, []).append(stored)
    return found


def _natural_order(name: str) -> list[str | int]:
    """Sort key by which experts.2 comes before experts.10: converted tensors are stacked in this order."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def allocate_and_load(allocate: Callable[[nn.Module], nn.Module], model: nn.Module, path: str | None) -> nn.Module:
    """Give a meta model storage by `allocate` (the whole model, or this rank's shards), and read its weights into it.

    UserError where the files lack a weight of the model, or have it in another shape.
    """
    weights = named_weights(model, path)  # first: transformers finds conversions by the class, which sharding changes
    model = allocate(model)
    names = fill_weights(model, weights)
    tensors = model.state_dict(keep_vars=True)
    filled = {id(tensors[name]) for name in names}
    missing = [name for name, tensor in tensors.items() if id(tensor) not in filled]
    if missing:
        raise UserError(
            f"model.path = {resolve_path(path)!r}: its safetensors files have no weights for {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}. Give a folder that has all weights."
        )
    return model

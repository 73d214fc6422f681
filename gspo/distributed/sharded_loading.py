"""A model without its weights, and a folder's weights without the model: what sharded loading is made of.

Weights are read tensor by tensor, and of a tensor the part that is asked for, so that a rank reads its own shards and
no model is ever whole in one place.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightTransform, rename_source_key

from gspo.distributed.transfer import fill_weights
from gspo.errors import UserError
from gspo.models.compiled_layers import install_compiled_layers
from gspo.models.loading import cannot_open, cast_parameters, load_model_config, resolve_path
from gspo.models.replaced import replaced
from gspo.models.safetensors_files import Weights, open_weights

Part = Callable[[tuple[slice, ...]], Tensor]  # slices of a tensor, one a dimension -> that part of it, on the CPU
Wanted = dict[str, list[str]]  # pattern -> the tensors of the folder that match it


def meta_model(path: str | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The causal LM at `path` as `load_model` opens it, but its parameters, of `dtype`, are on the meta device.

    Buffers are real: rotary frequencies are in no file, and are computed as the model is built. Only config.json is
    read. UserError when it cannot be had.
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
    """The folder of a model, fetched from the hub where `path` is a name there. UserError when it cannot be had."""
    name = resolve_path(path)
    if Path(name).exists():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as e:  # the hub raises a dozen kinds
        raise cannot_open(name, e) from e


def named_weights(model: nn.Module, path: str | None) -> Iterator[tuple[str, Part]]:
    """(name in the model, how to read parts of it) of every tensor in a model's folder that the model has.

    Names are the model's state_dict's, both of a tied pair if the files have both. What transformers stores in another
    form than its modules hold (experts one by one) is put together whole, one such tensor at a time, and cut then.
    """
    weights = open_weights(local_folder(path))
    return _read(model, weights, _sources(model, weights, get_model_conversion_mapping(model)))


def _read(
    model: nn.Module, weights: Weights, sources: dict[str, tuple[WeightConverter | None, Wanted]]
) -> Iterator[tuple[str, Part]]:
    for name, (rule, wanted) in sources.items():
        if rule is None:
            (source,) = wanted
            yield name, lambda slices, source=source: weights.read(source, slices)
            continue
        for pattern, sources in wanted.items():
            for source in sources:
                rule.add_tensor(name, source, pattern, weights.read(source))
        for target, whole in rule.convert(name, model=model, config=model.config).items():
            whole = whole[0] if isinstance(whole, list) else whole
            yield target, lambda slices, whole=whole: whole[slices]


def _sources(
    model: nn.Module, weights: Weights, mapping: list[WeightTransform]
) -> dict[str, tuple[WeightConverter | None, Wanted]]:
    """First target's name -> the rule that makes it, and of which tensors; no rule: one tensor, as it is."""
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in mapping if not isinstance(rule, WeightConverter)]
    known, prefix = model.state_dict(keep_vars=True), model.base_model_prefix
    rules = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    found: dict[str, tuple[WeightConverter | None, Wanted]] = {}
    for source in sorted(weights.names, key=_natural):
        name, pattern = rename_source_key(source, renamings, converters, prefix, known)
        if name not in known and source in known:
            name, pattern = source, None
        if name not in known:
            continue
        if pattern is None:
            found[name] = None, {source: [source]}
        else:
            rule, wanted = found.setdefault(name, (copy.deepcopy(rules[pattern]), {}))
            wanted.setdefault(pattern, []).append(source)
    return found


def _natural(name: str) -> list[str | int]:
    """experts.2 before experts.10: converted tensors are stacked in this order."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def allocate_and_load(place: Callable[[nn.Module], nn.Module], model: nn.Module, path: str | None) -> nn.Module:
    """A skeleton, given room by `place` (whole, or in shards of which each rank reads its own), and its weights.

    UserError where the files lack something that the model needs, or have it in another size.
    """
    weights = named_weights(model, path)  # before `place`: transformers knows names by classes, which sharding changes
    model = place(model)
    done = fill_weights(model, weights)
    tensors = model.state_dict(keep_vars=True)
    filled = {id(tensors[name]) for name in done}
    missing = [name for name, tensor in tensors.items() if id(tensor) not in filled]
    if missing:
        raise UserError(
            f"model.path = {resolve_path(path)!r}: its files have no weights for {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}. Give a folder whose safetensors are whole."
        )
    return model

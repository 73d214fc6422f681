"""Build a model on the meta device, shard it, and read each rank's part of every weight from its safetensors files.

Weights are read tensor by tensor, and of each tensor only the slices that a rank holds, so no rank ever has the whole
model.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn

from gspo.distributed.move_weights import ReadSlices, fill_weights, local_shard
from gspo.models.generation import read_generation_config
from gspo.models.kernel_layers import install_layer_kernels
from gspo.models.loading import build_model, cast_parameters, load_model_config
from gspo.models.model_folder import cannot_open, resolve_path
from gspo.models.patching import replaced
from gspo.models.safetensors_files import Weights, open_weights
from gspo.models.stored_weights import Sources, check_stored, refuse_non_finite, state_of


def meta_model(path: str | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build the causal LM at `path` as `load_model` does, but with its parameters, of `dtype`, on the meta device.

    Buffers have storage: rotary frequencies are in no file, and are computed while the model is built. Only config.json
    is read. UserError when there is none.
    """
    config = load_model_config(path)
    with replaced([(nn.Module, "register_parameter", _register_on_meta)]):
        model = build_model(config, resolve_path(path), dtype=torch.float32)
    if (generation := read_generation_config(resolve_path(path))) is not None:
        model.generation_config = generation
    model.config.use_cache = False
    return cast_parameters(install_layer_kernels(model.eval()), dtype)


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
    """Yield (name in the model's state_dict, function that reads slices of it) for every tensor the model has.

    Of a tied pair both names come, if the files have both. A tensor that transformers stores in another form than its
    modules hold (experts one by one) is assembled whole, one such tensor at a time, and then sliced. UserError unless
    the files hold the model's tensors and no others.
    """
    weights = open_weights(local_folder(path))
    return _read(model, weights, check_stored(resolve_path(path), model, weights))


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


def allocate_and_load(allocate: Callable[[nn.Module], nn.Module], model: nn.Module, path: str | None) -> nn.Module:
    """Give a meta model storage by `allocate` (the whole model, or this rank's shards), and read its weights into it.

    UserError where the files lack a weight of the model, hold one that it has not, have it in another shape, or have
    values that are not finite.
    """
    weights = named_weights(model, path)  # first: transformers finds conversions by the class, which sharding changes
    model = allocate(model)
    fill_weights(model, weights)
    refuse_non_finite(resolve_path(path), ((name, local_shard(x)) for name, x in state_of(model)))
    return model

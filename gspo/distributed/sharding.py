"""Models in shards over meshes of ranks. Everything works, unchanged, on one process.

Layout: every rank trains its share of the groups on FSDP2 shards over all ranks. Sampling never runs through the
shards (that would gather the weights once a token): each rank has a whole copy, or, with tensor parallelism, each
group of `tp` neighbouring ranks shares one.
"""

from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gspo.distributed.transfer import local_shard
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.models.loading import decoder_layers


def check_shard_size(shard_size: int | None, world_size: int) -> None:
    """UserError where the ranks make no whole rows of `shard_size`."""
    if shard_size and world_size % shard_size:
        raise UserError(
            f"model.shard_size = {shard_size} does not divide the {world_size} processes of this run; give the number "
            "of processes of one node, or leave it empty."
        )


def with_hybrid_mesh(world: World, shard_size: int | None) -> World:
    """The world with its ranks in rows of `shard_size` neighbours that hold one copy of the weights together, a copy a
    row. UserError where they make no whole rows."""
    if world.mesh is None or shard_size in (None, world.size):
        return world
    check_shard_size(shard_size, world.size)
    shape, names = (world.size // shard_size, shard_size), ("replicate", "shard")
    return replace(world, mesh=init_device_mesh(world.device.type, shape, mesh_dim_names=names))


def needs_sharding(world: World, offload: bool) -> bool:
    """Whether a model becomes shards: always on several ranks; on one only to be kept off a GPU."""
    return world.mesh is not None and (world.size > 1 or offload)


def shard(model: nn.Module, world: World, dtype: torch.dtype, offload: bool) -> nn.Module:
    """A model -> shards of it, to be filled where it is on the meta device; with `offload` they live on the CPU between
    uses.

    Units that are gathered and given back one by one: every decoder layer, embedding, head, and what is left; an
    embedding and a head that are tied are of what is left. Several ranks compute in `dtype`; one process as if the
    model were whole, under autocast.
    """
    alone, empty = world.size == 1, next(model.parameters()).is_meta
    options = {
        "mesh": world.mesh,
        "mp_policy": MixedPrecisionPolicy() if alone else MixedPrecisionPolicy(dtype, torch.float32),
        "reshard_after_forward": True,  # the root too: parameters are shards whenever we look at them
        "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy(),
    }
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = [] if head is None or head.weight is embedding.weight else [embedding, head]
    for unit in [*decoder_layers(model), *apart]:
        fully_shard(unit, **options)
    fully_shard(model, **options)
    for unit in {model, head} - {None}:
        if is_sharded(unit):
            unit.run_as_forward = MethodType(_apply, unit)
            register_fsdp_forward_method(unit, "run_as_forward")
    return _allocate(model, torch.device("cpu") if offload else world.device, world.device) if empty else model


def _allocate(model: nn.Module, device: torch.device, buffers_on: torch.device) -> nn.Module:
    """Storage for parameters that have none; buffers, which have, keep their values."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    model.to_empty(device=device)
    for name, buffer in buffers.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, buffer.to(buffers_on))
    return model


def materialize(model: nn.Module, world: World) -> nn.Module:
    """A model on the meta device -> a whole one on this rank's, not yet filled."""
    _allocate(model, world.device, world.device).tie_weights()  # which have come apart
    return model


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def before_backward(model: nn.Module, last: bool, keep_weights: bool, reduce_once: bool) -> None:
    """What ranks exchange in the next forward and backward, one of several that add up a gradient.

    Copies of the weights (`hybrid`) meet only in the last. With `keep_weights` each unit is gathered once for all of
    them, with `reduce_once` gradients stay whole until the last. Ordinary forwards follow the last.
    """
    if not is_sharded(model):
        return
    model.set_reshard_after_forward(not keep_weights)
    model.set_reshard_after_backward(last or not keep_weights)
    model.set_requires_gradient_sync(last or not reduce_once)
    model.set_requires_all_reduce(last)


def after_backward(model: nn.Module) -> None:
    """Weights are given back after every forward again: what is only scored is not differentiated."""
    if is_sharded(model):
        model.set_reshard_after_forward(True)


def _apply(model: nn.Module, function: Callable, *args: Any) -> Any:
    return function(model, *args)


def run_as_forward(model: nn.Module, function: Callable, *args: Any) -> Any:
    """function(model, *args) as a forward of the model's (or of a head's): what a sharded one keeps outside its layers
    is whole meanwhile."""
    return model.run_as_forward(function, *args) if is_sharded(model) else function(model, *args)


def shard_sampler(model: nn.Module, world: World, tp: int) -> tuple[nn.Module, Callable[[Tensor], Tensor] | None]:
    """A whole copy on the device, or one spread over `tp` ranks by the plan transformers publishes for it.

    Returns the model and, with tp > 1, the function by which a group's ranks agree on the tokens drawn.
    """
    model.requires_grad_(False)
    if tp == 1:
        return model.to(world.device), None
    mesh = init_device_mesh(world.device.type, (world.size // tp, tp), mesh_dim_names=("dp", "tp"))["tp"]
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan = {name: styles[style]() for name, style in model.config.base_model_tp_plan.items() if style in styles}
    model.to(world.device)
    parallelize_module(model.base_model, mesh, plan)
    group, source = mesh.get_group(), dist.get_global_rank(mesh.get_group(), 0)

    def agree(tokens: Tensor) -> Tensor:
        dist.broadcast(tokens, src=source, group=group)
        return tokens

    return model, agree


def check_tensor_parallel(model_config: Any, world_size: int, tp: int) -> None:
    """UserError when `tp` fits neither the ranks nor the model."""
    if tp == 1:
        return
    c, key = model_config.get_text_config(), f"rollout.tensor_model_parallel_size = {tp}"
    if world_size % tp:
        raise UserError(
            f"{key} does not divide the {world_size} processes of this run; start torchrun with a multiple."
        )
    if not getattr(c, "base_model_tp_plan", None):
        raise UserError(f"{key}: transformers publishes no tensor-parallel plan for {c.model_type}; use 1.")
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    if c.num_attention_heads % tp or heads % tp or c.intermediate_size % tp:
        raise UserError(
            f"{key} does not divide this model's {c.num_attention_heads} / {heads} heads; use a smaller one."
        )


def local_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters on this rank."""
    return sum(local_shard(p).nbytes for p in model.parameters())

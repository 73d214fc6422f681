"""Shard models over meshes of ranks: FSDP2 or HSDP for training, tensor parallelism for sampling.

Every rank trains its share of the groups on FSDP2 shards over all ranks. Sampling never runs through the shards (that
would gather the weights for every token): each rank has a whole copy, or, with tensor parallelism, `tp` neighbouring
ranks share one. On one process everything works the same.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from gspo.distributed.move_weights import local_shard
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.models.loading import decoder_layers


def check_shard_size(shard_size: int | None, world_size: int) -> None:
    """Raise UserError unless `shard_size` divides the number of ranks."""
    if shard_size and world_size % shard_size:
        raise UserError(
            f"model.shard_size = {shard_size} does not divide the {world_size} processes of this run; give the number "
            "of processes of one node, or leave it empty."
        )


def with_hybrid_mesh(world: World, shard_size: int | None) -> World:
    """Return the world with a mesh [replicate, shard] for HSDP: each `shard_size` neighbouring ranks shard one copy.

    UserError unless `shard_size` divides the number of ranks.
    """
    if world.mesh is None or shard_size in (None, world.size):
        return world
    check_shard_size(shard_size, world.size)
    shape, names = (world.size // shard_size, shard_size), ("replicate", "shard")
    return replace(world, mesh=init_device_mesh(world.device.type, shape, mesh_dim_names=names))


def needs_sharding(world: World, offload: bool) -> bool:
    """Return whether a model is sharded: on several ranks always; on one only to offload it from the GPU."""
    return world.mesh is not None and (world.size > 1 or offload)


def sharding_units(model: nn.Module) -> list[nn.Module]:
    """Return the parts that FSDP gathers and frees one by one: decoder layers, and an untied embedding and head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    return [*decoder_layers(model), *([] if tied else [embedding, head])]


def shard(model: nn.Module, world: World, dtype: torch.dtype, offload: bool) -> nn.Module:
    """Shard a model with FSDP2. With `offload` the shards live on the CPU between uses.

    Gathered and freed one by one are the `sharding_units`, and the rest of the model as one more. Several ranks compute
    in `dtype`; one process computes as with an unsharded model, under autocast. Shards of a model on the meta device
    get storage, but no values.
    """
    alone, on_meta = world.size == 1, next(model.parameters()).is_meta
    options = {
        "mesh": world.mesh,
        "mp_policy": MixedPrecisionPolicy() if alone else MixedPrecisionPolicy(dtype, torch.float32),
        "reshard_after_forward": True,  # the root too, so that parameters are shards between two forwards
        "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload else OffloadPolicy(),
    }
    for unit in sharding_units(model):
        fully_shard(unit, **options)
    fully_shard(model, **options)
    for unit in {model, model.get_output_embeddings()} - {None}:
        if is_sharded(unit):
            unit.run_as_forward = MethodType(_call, unit)
            register_fsdp_forward_method(unit, "run_as_forward")
    if not on_meta:
        return model
    return _allocate(model, torch.device("cpu") if offload else world.device, buffers_on=world.device)


def _allocate(model: nn.Module, device: torch.device, buffers_on: torch.device) -> nn.Module:
    """Give the parameters storage on `device`, without values; move the buffers, with theirs, to `buffers_on`."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    model.to_empty(device=device)
    for name, buffer in buffers.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, buffer.to(buffers_on))
    return model


def materialize(model: nn.Module, world: World) -> nn.Module:
    """Give a whole model on the meta device storage on this rank's device, without values."""
    _allocate(model, world.device, world.device).tie_weights()  # to_empty unties them
    return model


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` has been called on the model (or on this part of it)."""
    return isinstance(model, FSDPModule)


def before_backward(model: nn.Module, last: bool, keep_weights: bool, reduce_once: bool) -> None:
    """Choose what the ranks exchange in the next forward and backward, one of several that accumulate a gradient.

    last: it is the last of them; only then HSDP sums the gradients of its copies. keep_weights: gather each layer once
    for all of them (model.reshard_after_forward=false). reduce_once: keep unsharded gradients until the last
    (optim.gradient_reduction=step). Call `after_backward` after the last.
    """
    if not is_sharded(model):
        return
    model.set_reshard_after_forward(not keep_weights)
    model.set_reshard_after_backward(last or not keep_weights)
    model.set_requires_gradient_sync(last or not reduce_once)
    model.set_requires_all_reduce(last)


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Average the gradients of parameters that every rank holds whole, as FSDP does those of its shards."""
    if world.size > 1:
        for p in parameters:
            dist.all_reduce(p.grad)
            p.grad /= world.size


def after_backward(model: nn.Module) -> None:
    """Free gathered weights after every forward again: the forwards that follow only score and have no backward."""
    if is_sharded(model):
        model.set_reshard_after_forward(True)


def gathers_once(ranks: int, policy_offloaded: bool) -> bool:
    """Tell whether a frozen model that is offloaded comes over as a whole, once for all micro-batches that it scores.

    On one GPU it does: it takes less there than the policy's gradients do later, unless they are offloaded as well.
    """
    return ranks == 1 and not policy_offloaded


@contextmanager
def gathered_once(model: nn.Module) -> Iterator[None]:
    """Keep the weights that a forward gathers until the block ends, for the forwards after it."""
    model.set_reshard_after_forward(False)
    try:
        yield
    finally:
        model.set_reshard_after_forward(True)
        for unit in model.modules():
            if is_sharded(unit):
                unit.reshard()


def _call(model: nn.Module, function: Callable, *args: Any) -> Any:
    return function(model, *args)


def run_as_forward(model: nn.Module, function: Callable, *args: Any) -> Any:
    """Call through FSDP's forward hooks, so that the root's own parameters (embedding, norm, head) are gathered.

    Return function(model, *args). `model` may be a whole model or its head; one that is not sharded is simply passed.
    """
    return model.run_as_forward(function, *args) if is_sharded(model) else function(model, *args)


def local_bytes(model: nn.Module) -> int:
    """Return how many bytes of a model's parameters this rank holds."""
    return sum(local_shard(p).nbytes for p in model.parameters())

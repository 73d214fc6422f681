"""Ranks, meshes, sharding: the only home of torch.distributed. Everything works, unchanged, on one process.

Layout: every rank trains its share of the groups on FSDP2 shards over all ranks. Sampling never runs through the
shards (that would gather the weights once a token): each rank has a whole copy, or, with tensor parallelism, each
group of `tp` neighbouring ranks shares one.
"""

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gspo.errors import UserError
from gspo.models.loading import decoder_layers
from gspo.system.malloc import keep_freed_memory

PIECE = 2**26  # numbers of a parameter that is between two shardings


@dataclass(frozen=True)
class World:
    """This process among its peers. `mesh` is None when there is no process group."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def positions(self, count: int, tp: int = 1) -> list[int]:
        """The places of a list of prompts that this rank samples and scores; with tp > 1, its whole group of tp ranks.

        Strided; who trains on what is decided by the lengths of the answers (packing/balance.py).
        """
        first = self.rank - self.rank % tp
        return [p for p in range(count) if first <= p % self.size < first + tp]

    def max(self, value: int) -> int:
        """The largest of the ranks' values."""
        return max(self.gather(value))

    def sum(self, value: float) -> float:
        return sum(self.gather(value))

    def gather(self, value: Any) -> list[Any]:
        """[value of rank 0, value of rank 1, ...], on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def exchange(self, parcels: list[Any]) -> list[Any]:
        """parcels[r] is for rank r -> [what rank 0 had for this rank, what rank 1 had, ...]; None costs nothing.

        Each object crosses the wire once, from its rank to the one that wants it. Tensors must be on the CPU.
        """
        if self.size == 1:
            return parcels
        away = [b"" if r == self.rank or x is None else pickle.dumps(x) for r, x in enumerate(parcels)]
        sent = torch.tensor([len(x) for x in away])
        due = torch.empty_like(sent)
        dist.all_to_all_single(due, sent)
        arrived = torch.empty(int(due.sum()), dtype=torch.uint8)
        mail = torch.frombuffer(bytearray(b"".join(away)), dtype=torch.uint8) if sent.any() else arrived[:0]
        dist.all_to_all_single(arrived, mail, due.tolist(), sent.tolist())
        opened = [pickle.loads(memoryview(x.numpy())) if len(x) else None for x in arrived.split(due.tolist())]
        opened[self.rank] = parcels[self.rank]
        return opened

    def collect(self, places: list[int], rows: Tensor) -> Tensor:
        """Rows [G, ...] that belong at `places` of a whole -> the whole, on the CPU, on every rank."""
        pairs = [pair for part in self.gather((places, rows.cpu())) for pair in zip(*part, strict=True)]
        return torch.stack([row for _, row in sorted(pairs, key=lambda pair: pair[0])])

    def main_first(self, make: Callable[[], Any]) -> Any:
        """Run `make` on every rank, on rank 0 before the others; a UserError there is raised everywhere."""
        mine = []
        self.from_main(lambda: mine.append(make()))
        return mine[0] if mine else make()

    def from_main(self, make: Callable[[], Any]) -> Any:
        """Run `make` on rank 0 only and give everyone its result; a UserError there is raised everywhere."""
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [(make(), None)]
            except UserError as e:
                outcome = [(None, str(e))]
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        result, error = outcome[0]
        if error is not None:
            raise UserError(error)
        return result


def _store_of_this_attempt() -> dist.Store:
    """torchrun's store, where ranks find each other. It outlives a restart, after which a rank that is faster than the
    others would find addresses of processes that have ended: each attempt has names of its own."""
    store, _, _ = next(rendezvous("env://"))
    store.set_timeout(dist.distributed_c10d.default_pg_timeout)
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextmanager
def session() -> Iterator[World]:
    """Join the process group that torchrun describes, if any; leave it at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, cores // local))
        keep_freed_memory()
    mesh = None
    if size > 1 or device.type == "cuda":  # on one GPU too: the offloaded reference is an FSDP module
        backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        store = _store_of_this_attempt() if size > 1 else dist.HashStore()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("fsdp",))
    try:
        yield World(rank, size, device, mesh)
    finally:
        if mesh is not None:
            dist.destroy_process_group()


def check_shard_size(shard_size: int | None, world_size: int) -> None:
    """UserError where the ranks make no whole rows of `shard_size`."""
    if shard_size and world_size % shard_size:
        raise UserError(
            f"model.shard_size = {shard_size} does not divide the {world_size} processes of this run; give the number "
            "of processes of one node, or leave it empty."
        )


def hybrid(world: World, shard_size: int | None) -> World:
    """The world with its ranks in rows of `shard_size` neighbours that hold one copy of the weights together, a copy a
    row. UserError where they make no whole rows."""
    if world.mesh is None or shard_size in (None, world.size):
        return world
    check_shard_size(shard_size, world.size)
    shape, names = (world.size // shard_size, shard_size), ("replicate", "shard")
    return replace(world, mesh=init_device_mesh(world.device.type, shape, mesh_dim_names=names))


def shards(world: World, offload: bool) -> bool:
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
        if isinstance(unit, FSDPModule):
            unit.inside = MethodType(_apply, unit)
            register_fsdp_forward_method(unit, "inside")
    return _with_room(model, torch.device("cpu") if offload else world.device, world.device) if empty else model


def _with_room(model: nn.Module, device: torch.device, buffers_on: torch.device) -> nn.Module:
    """Storage for parameters that have none; buffers, which have, keep their values."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    model.to_empty(device=device)
    for name, buffer in buffers.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, buffer.to(buffers_on))
    return model


@torch.no_grad()
def fill(model: nn.Module, weights: Iterable[tuple[str, Callable[[tuple[slice, ...]], Tensor]]]) -> set[str]:
    """Put weights, named as in `state_dict()`, into a model of any sharding; of each, what this rank holds is read.

    Returns the names. UserError where a weight is of another size than the model's.
    """
    tensors, filled = model.state_dict(keep_vars=True), set()
    for name, read in weights:
        x = tensors[name]
        local, part = x.to_local() if isinstance(x, DTensor) else x, read(held(x))
        if part.shape != local.shape:
            raise UserError(
                f"model.path: {name} is {list(x.shape)} by the model's config.json, and its files have another size "
                f"({list(part.shape)} where {list(local.shape)} are expected). Give files that fit it."
            )
        local.copy_(part)
        filled.add(name)
    return filled


def on_device(model: nn.Module, world: World) -> nn.Module:
    """A model on the meta device -> a whole one on this rank's, not yet filled."""
    _with_room(model, world.device, world.device).tie_weights()  # which have come apart
    return model


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def before_backward(model: nn.Module, last: bool, keep_weights: bool, reduce_once: bool) -> None:
    """What ranks exchange in the next forward and backward, one of several that add up a gradient.

    Copies of the weights (`hybrid`) meet only in the last. With `keep_weights` each unit is gathered once for all of
    them, with `reduce_once` gradients stay whole until the last. Ordinary forwards follow the last.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_reshard_after_forward(not keep_weights)
    model.set_reshard_after_backward(last or not keep_weights)
    model.set_requires_gradient_sync(last or not reduce_once)
    model.set_requires_all_reduce(last)


def after_backward(model: nn.Module) -> None:
    """Weights are given back after every forward again: what is only scored is not differentiated."""
    if isinstance(model, FSDPModule):
        model.set_reshard_after_forward(True)


def _apply(model: nn.Module, function: Callable, *args: Any) -> Any:
    return function(model, *args)


def inside(model: nn.Module, function: Callable, *args: Any) -> Any:
    """function(model, *args) as a forward of the model's (or of a head's): what a sharded one keeps outside its layers
    is whole meanwhile."""
    return model.inside(function, *args) if isinstance(model, FSDPModule) else function(model, *args)


def rounded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Linear layers in `dtype`: what autocast would make of them at every forward. Not those that share an embedding's
    weight, which it leaves alone."""
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    for m in model.modules():
        if isinstance(m, nn.Linear) and m.weight not in embeddings:
            m.to(dtype)
    return model


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


def whole(tensor: Tensor) -> Tensor:
    """The full tensor behind a shard (all ranks must call this together); a plain tensor is returned as it is."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if tensor.device.type == "cpu" and tensor.device_mesh.device_type == "cuda":  # offloaded: gather on the device
        tensor = tensor.to("cuda")
    return tensor.detach().full_tensor()


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard, or a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters on this rank."""
    return sum(local_part(p).nbytes for p in model.parameters())


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """target <- source, parameter by parameter, whatever the two's sharding and dtypes.

    Between shards of two kinds a parameter flows in pieces of PIECE numbers, in the target's dtype: no rank holds more
    of it at a time, beside what is its own.
    """
    for (name, p), (other, q) in zip(source.named_parameters(), target.named_parameters(), strict=True):
        assert name == other, (name, other)
        sharded = isinstance(p, DTensor), isinstance(q, DTensor)
        if not any(sharded):
            q.copy_(p)
            continue
        if all(sharded) and p.device_mesh == q.device_mesh:
            q.to_local().copy_(p.to_local())
            continue
        *rows, own = held(q)
        mine = q.to_local() if isinstance(q, DTensor) else q
        for columns in _columns(p):
            piece = whole(p[..., columns].to(q.dtype))
            start, stop = max(own.start, columns.start), max(own.start, min(own.stop, columns.stop))
            wanted = piece[(*rows, slice(start - columns.start, stop - columns.start))]
            mine[..., start - own.start : stop - own.start].copy_(wanted)


def _columns(p: Tensor) -> Iterator[slice]:
    """Slices of a tensor's last dimension, which is sharded in vectors only, that hold PIECE numbers or a column."""
    width = p.shape[-1]
    step = width if p.ndim == 1 else max(1, PIECE * width // p.numel())
    return (slice(at, min(at + step, width)) for at in range(0, width, step))


def held(tensor: Tensor) -> tuple[slice, ...]:
    """The slices, one a dimension, of the whole tensor that this rank holds."""
    at = [slice(0, n) for n in tensor.shape]
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for placement, size, place in zip(tensor.placements, mesh.shape, mesh.get_coordinate(), strict=True):
            if not placement.is_replicate():
                d, (start, stop) = placement.dim, (at[placement.dim].start, at[placement.dim].stop)
                step = -(-(stop - start) // size)  # as torch.chunk cuts
                at[d] = slice(min(start + place * step, stop), min(start + (place + 1) * step, stop))
        assert tuple(s.stop - s.start for s in at) == tensor.to_local().shape, (at, tensor.to_local().shape)
    return tuple(at)


Read = Callable[[str, tuple[slice, ...]], Tensor]  # a tensor's name, slices of it -> that part, on the CPU


@torch.no_grad()
def load_weights(model: nn.Module, read: Read) -> None:
    """Fill a model of any sharding, tensor by tensor, each rank with what it holds. No communication."""
    for name, p in model.named_parameters():
        (p.to_local() if isinstance(p, DTensor) else p).copy_(read(name, held(p)))


def load_like(name: str, read: Read, like: Tensor) -> Tensor:
    """The tensor `name`, sharded and placed as `like` is. No communication."""
    part = read(name, held(like)).to(like.device, like.dtype, copy=True)
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.shape, like.stride()
    sharded = DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
    return sharded.to(like.device)

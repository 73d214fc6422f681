"""Move weights into and out of shards: from files, from one model to another, and gathered into full tensors."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gspo.errors import UserError
from gspo.models.lora import plain_name

PIECE_NUMEL = 2**26  # elements of a parameter that are gathered at a time on their way from one sharding to another
ReadSlices = Callable[[tuple[slice, ...]], Tensor]  # slices of a tensor, one a dimension -> that part of it, on the CPU


@torch.no_grad()
def fill_weights(model: nn.Module, weights: Iterable[tuple[str, ReadSlices]]) -> set[str]:
    """Read weights, named as in `state_dict()`, into a model of any sharding: each rank reads only its own part.

    Of a model with adapters they are its base's. Return the names. UserError where a weight's shape is not the model's.
    """
    tensors = {plain_name(name): x for name, x in model.state_dict(keep_vars=True).items()}
    filled = set()
    for name, read in weights:
        x = tensors[name]
        local, part = local_shard(x), read(local_slices(x))
        if part.shape != local.shape:
            raise UserError(
                f"model.path: {name} has the shape {list(x.shape)} by the model's config.json, but its files hold "
                f"{list(part.shape)} where {list(local.shape)} is expected. Give weights that match it."
            )
        local.copy_(part)
        filled.add(name)
    return filled


def local_shard(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds: its shard; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor. All ranks must call this together. A plain tensor is returned as it is."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if tensor.device.type == "cpu" and tensor.device_mesh.device_type == "cuda":  # offloaded: gather on the device
        tensor = tensor.to("cuda")
    return tensor.detach().full_tensor()


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy every parameter of `source` into `target`, whatever the sharding and the dtype of the two.

    Where their shardings differ, a parameter is gathered in pieces of PIECE_NUMEL elements, in the target's dtype: no
    rank holds more of it at a time beside its own part.
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
        _copy_by_columns(p, q)


def _copy_by_columns(p: Tensor, q: Tensor) -> None:
    """Copy p into q, whose sharding differs: gather columns of p, keep those that this rank's part of q has."""
    *rows, own_columns = local_slices(q)
    own = local_shard(q)
    for columns in column_pieces(p):
        piece = full_tensor(p[..., columns].to(q.dtype))
        start = max(own_columns.start, columns.start)
        stop = max(own_columns.start, min(own_columns.stop, columns.stop))
        wanted = piece[(*rows, slice(start - columns.start, stop - columns.start))]
        own[..., start - own_columns.start : stop - own_columns.start].copy_(wanted)


def column_pieces(p: Tensor) -> Iterator[slice]:
    """Cut a tensor's last dimension, which is sharded in vectors only, into PIECE_NUMEL elements or single columns."""
    width = p.shape[-1]
    step = width if p.ndim == 1 else max(1, PIECE_NUMEL * width // p.numel())
    return (slice(at, min(at + step, width)) for at in range(0, width, step))


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Return which part of the full tensor this rank holds: a slice for each dimension."""
    slices = [slice(0, n) for n in tensor.shape]
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for placement, size, place in zip(tensor.placements, mesh.shape, mesh.get_coordinate(), strict=True):
            if not placement.is_replicate():
                d, (start, stop) = placement.dim, (slices[placement.dim].start, slices[placement.dim].stop)
                step = -(-(stop - start) // size)  # as torch.chunk cuts
                slices[d] = slice(min(start + place * step, stop), min(start + (place + 1) * step, stop))
        assert tuple(s.stop - s.start for s in slices) == tensor.to_local().shape, (slices, tensor.to_local().shape)
    return tuple(slices)


Read = Callable[[str, tuple[slice, ...]], Tensor]  # a tensor's name, slices of it -> that part of it, on the CPU


@torch.no_grad()
def load_weights(model: nn.Module, read: Read) -> None:
    """Read the parameters of a model of any sharding, each rank its own part. No communication."""
    for name, p in model.named_parameters():
        local_shard(p).copy_(read(name, local_slices(p)))


def load_like(name: str, read: Read, like: Tensor) -> Tensor:
    """Read the tensor `name`, sharded as `like` and on its device. No communication."""
    part = read(name, local_slices(like)).to(like.device, like.dtype, copy=True)
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.shape, like.stride()
    sharded = DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
    return sharded.to(like.device)

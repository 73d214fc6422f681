"""What flows into and out of shards: weights from files, from model to model, and whole tensors."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gspo.errors import UserError

PIECE_NUMEL = 2**26  # numbers of a parameter that is between two shardings


@torch.no_grad()
def fill_weights(model: nn.Module, weights: Iterable[tuple[str, Callable[[tuple[slice, ...]], Tensor]]]) -> set[str]:
    """Put weights, named as in `state_dict()`, into a model of any sharding; of each, what this rank holds is read.

    Returns the names. UserError where a weight is of another size than the model's.
    """
    tensors, filled = model.state_dict(keep_vars=True), set()
    for name, read in weights:
        x = tensors[name]
        local, part = local_shard(x), read(local_slices(x))
        if part.shape != local.shape:
            raise UserError(
                f"model.path: {name} is {list(x.shape)} by the model's config.json, and its files have another size "
                f"({list(part.shape)} where {list(local.shape)} are expected). Give files that fit it."
            )
        local.copy_(part)
        filled.add(name)
    return filled


def local_shard(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard, or a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor behind a shard (all ranks must call this together); a plain tensor is returned as it is."""
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
        *rows, own = local_slices(q)
        mine = local_shard(q)
        for columns in _columns(p):
            piece = full_tensor(p[..., columns].to(q.dtype))
            start, stop = max(own.start, columns.start), max(own.start, min(own.stop, columns.stop))
            wanted = piece[(*rows, slice(start - columns.start, stop - columns.start))]
            mine[..., start - own.start : stop - own.start].copy_(wanted)


def _columns(p: Tensor) -> Iterator[slice]:
    """Cut a tensor's last dimension, which is sharded in vectors only, into PIECE_NUMEL elements or single columns."""
    width = p.shape[-1]
    step = width if p.ndim == 1 else max(1, PIECE_NUMEL * width // p.numel())
    return (slice(at, min(at + step, width)) for at in range(0, width, step))


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
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
        local_shard(p).copy_(read(name, local_slices(p)))


def load_like(name: str, read: Read, like: Tensor) -> Tensor:
    """The tensor `name`, sharded and placed as `like` is. No communication."""
    part = read(name, local_slices(like)).to(like.device, like.dtype, copy=True)
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.shape, like.stride()
    sharded = DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
    return sharded.to(like.device)

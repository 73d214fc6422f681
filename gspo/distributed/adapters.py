"""Hold adapters of a sharded model: as models of their own, their first values, and merged into a sampler's weights."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gspo.distributed.move_weights import (
    column_pieces,
    full_tensor,
    load_weights,
    local_shard,
    local_slices,
)
from gspo.errors import UserError
from gspo.models.lora import POLICY, adapted_layers, adapter_parameters, merged
from gspo.models.safetensors_files import DTYPES, open_weights

FILE = "adapter_model"  # as peft calls it, with .safetensors behind


class Adapter:
    """One adapter of a model, as checkpoints and copies see a model: its parameters by their names in peft's files.

    `name` None is the base, which has none.
    """

    def __init__(self, model: nn.Module, name: str | None):
        self.model, self.name = model, name

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return adapter_parameters(self.model, self.name)

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for _, p in self.named_parameters())

    def state_dict(self, keep_vars: bool = False) -> dict[str, Tensor]:
        """Return its tensors by name, as a module's `state_dict` does."""
        return {name: p if keep_vars else p.detach() for name, p in self.named_parameters()}


@torch.no_grad()
def initialize_adapters(model: nn.Module, seed: int) -> nn.Module:
    """Give every adapter of a model its first values, the same for each, and on any number of ranks; return the model.

    A is uniform within 1 / sqrt(inputs), as peft draws it, and B zero: the model begins as its base.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        rank, inputs = next(iter(layer.lora_A.values())).weight.shape
        drawn = (2.0 * torch.rand(rank, inputs, generator=generator) - 1.0) / inputs**0.5
        for part in layer.lora_A.values():
            local_shard(part.weight).copy_(drawn[local_slices(part.weight)])
        for part in layer.lora_B.values():
            local_shard(part.weight).zero_()
    return model


def load_adapter(adapter: Adapter, folder: str) -> None:
    """Read an adapter from a checkpoint, each rank its own part. UserError where the file holds another one."""
    stored = open_weights(folder, FILE)
    wanted = dict(adapter.named_parameters())
    if other := sorted(wanted.keys() ^ set(stored.names)):
        raise UserError(
            f"{folder}/{FILE}.safetensors does not hold the adapter of model.lora: {other[0]} is in one of the two "
            "only. Give the targets that its run had."
        )
    for name, p in wanted.items():
        if stored.shape(name) != tuple(p.shape) or stored.spelled_dtype(name) != DTYPES[torch.float32]:
            raise UserError(
                f"{folder}/{FILE}.safetensors has {name} as {stored.spelled_dtype(name)} {list(stored.shape(name))}, "
                f"where model.lora asks for F32 {list(p.shape)}. Give the rank that its run had."
            )
    load_weights(adapter, stored.read)


@torch.no_grad()
def merge_weights(policy: nn.Module, scaling: float, target: nn.Module) -> None:
    """Write base + scaling * B A of the policy's adapted layers into a model without adapters, of any sharding.

    All other weights are the base's, and stay. A weight is gathered in pieces, and each rank computes its own part.
    """
    for name, layer in adapted_layers(policy).items():
        base, goal = layer.base_layer.weight, target.get_parameter(f"{name}.weight")
        a, b = full_tensor(layer.lora_A[POLICY].weight), full_tensor(layer.lora_B[POLICY].weight)
        (rows, own_columns), own = local_slices(goal), local_shard(goal)
        for columns in column_pieces(base):
            piece = full_tensor(base[..., columns])
            start, stop = max(own_columns.start, columns.start), min(own_columns.stop, columns.stop)
            if start >= stop:
                continue
            wanted = slice(start - columns.start, stop - columns.start)
            part = merged(piece[rows, wanted], a[:, start:stop], b[rows], scaling)
            own[:, start - own_columns.start : stop - own_columns.start].copy_(part)

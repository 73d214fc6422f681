"""Compute linear layers that are given the same tensor by one matrix product, while a GPU samples.

A decoding step multiplies few rows by every weight, and each product is a launch: queries, keys and values take one
instead of three, gate and up one instead of two. Which layers are given the same tensor is found by a trial. Their
weights are moved side by side into one storage, of which each weight stays a view: no second copy is kept, and whatever
is written to a weight later is in the product as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspo.models.patching import replaced
from gspo.rollout.attention_inputs import pack_prompts
from gspo.rollout.slot_attention import forward

JOINED_ON = {"cuda"}  # devices
_JOINED: "WeakKeyDictionary[nn.Module, list[_Product]]" = WeakKeyDictionary()


@torch.no_grad()
def join_weights(model: nn.Module, device: torch.device) -> None:
    """Lay the weights of layers that are given the same tensor side by side, on devices that gain by it. Once is
    enough: what is laid so stays so."""
    joined = _JOINED.get(model)
    if device.type in JOINED_ON and (joined is None or not all(product.holds() for product in joined)):
        _JOINED[model] = [_Product(layers) for layers in layers_given_alike(model, device)]


@contextmanager
def shared_products(model: nn.Module) -> Iterator[None]:
    """Run layers whose weights were joined by one product for all that are given the same tensor, without gradients."""
    products = _JOINED.get(model, [])
    forwards = [
        (layer, "forward", partial(product.part, i)) for product in products for i, layer in enumerate(product.layers)
    ]
    with replaced(forwards):
        yield


class _Product:
    """Linear layers whose weights lie side by side."""

    def __init__(self, layers: list[nn.Linear]):
        self.layers, self.sizes = layers, [m.out_features for m in layers]
        self.weight = _side_by_side([m.weight for m in layers])
        self.bias = None if layers[0].bias is None else _side_by_side([m.bias for m in layers])
        self._given: Tensor | None = None
        self._parts: list[Tensor | None] = []

    def part(self, i: int, x: Tensor) -> Tensor:
        """Return what layer i makes of x. The first layer that is given a tensor computes the product of all."""
        if x is not self._given or self._parts[i] is None:
            self._given, self._parts = x, list(F.linear(x, self.weight, self.bias).split(self.sizes, -1))
        found, self._parts[i] = self._parts[i], None
        if not any(part is not None for part in self._parts):
            self._given = None
        return found

    def holds(self) -> bool:
        """Return whether the layers' weights still are where they were put."""
        parts = self.weight.split(self.sizes)
        return all(m.weight.data_ptr() == part.data_ptr() for m, part in zip(self.layers, parts, strict=True))


def _side_by_side(tensors: list[nn.Parameter]) -> Tensor:
    """Move parameters into one storage, and return it as a tensor."""
    whole = torch.cat(list(tensors))
    for x, part in zip(tensors, whole.split([len(x) for x in tensors]), strict=True):
        x.data = part
    return whole


def layers_given_alike(model: nn.Module, device: torch.device) -> list[list[nn.Linear]]:
    """Return the linear layers of one module that are given the very same tensor, by a forward over one token."""
    calls: dict[nn.Module, list[tuple[nn.Linear, Tensor]]] = {}

    def record(parent: nn.Module, m: nn.Linear, x: Tensor) -> Tensor:
        calls.setdefault(parent, []).append((m, x))
        return type(m).forward(m, x)

    inside = [(parent, m) for parent in model.modules() for m in parent.children() if _is_plain(m)]
    with replaced([(m, "forward", partial(record, parent, m)) for parent, m in inside]):
        forward(model, pack_prompts([(0,)], device))
    groups = []
    for called in calls.values():
        for x in {id(x): x for _, x in called}.values():
            alike = [m for m, given in called if given is x]
            kinds = {(m.weight.dtype, m.bias is None) for m in alike}
            if 1 < len(alike) == len(set(alike)) and len(kinds) == 1:
                groups.append(alike)
    return groups


def _is_plain(m: nn.Module) -> bool:
    """Tell whether a module is a linear layer that is neither sharded nor anything else."""
    return type(m) is nn.Linear and "forward" not in vars(m) and not hasattr(m.weight, "device_mesh")

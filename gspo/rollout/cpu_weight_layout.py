"""Lay out the weights of linear layers for each rollout, in the order in which CPU matrix products read them.

A decoding step multiplies few rows by every weight, and oneDNN lays a weight out anew for each product: with 32 rows
that takes as long again as the product in float32, and a third of it in bf16.
"""

import functools
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from gspo.kernels.onednn_linear_cpu import onednn_lay_out, onednn_linear, onednn_works
from gspo.kernels.panel_linear_cpu import can_lay_out, laid_out_linear, lay_out
from gspo.kernels.product_choice_cpu import Shape, panels_win
from gspo.models.patching import replaced

SHARE = 0.25  # of the machine's memory: of a model with larger linear layers no second copy is made


@contextmanager
def laid_out_weights(model: nn.Module, rows: int) -> Iterator[dict[nn.Module, Tensor]]:
    """Run a model's linear layers with weights laid out for products of about `rows` rows, without gradients.

    -> layer -> its weight, for layers that our kernel multiplies; oneDNN multiplies the others, and all where a
    measurement says that it is faster. On CPUs only. Products are the same to rounding. The weights must not change
    inside.
    """
    ours, forwards, layers = {}, [], _linear_layers(model)
    taken = _taken_by_kernel(layers, rows)
    for m in layers:
        if m in taken:
            ours[m] = lay_out(m.weight)
            forwards.append((m, "forward", functools.partial(laid_out_linear, ours[m], m.out_features, m.bias)))
        elif onednn_works(m.weight.dtype):
            weight = onednn_lay_out(m.weight, rows)
            forwards.append((m, "forward", functools.partial(onednn_linear, weight, m.bias)))
    with replaced(forwards):
        yield ours


def laid_out_bytes(model: nn.Module) -> int:
    """Return the bytes that the second copies of a model's weights take."""
    return sum(m.weight.nbytes for m in _linear_layers(model) if can_lay_out(m.weight) or onednn_works(m.weight.dtype))


def _taken_by_kernel(layers: list[nn.Linear], rows: int) -> set[nn.Linear]:
    """Return the layers that our kernel multiplies: those that it can, where oneDNN is not faster.

    Layers of one size among several are decided together, as a step of all of them in one call needs all; a size that
    occurs once, such as the head's, is decided by itself.
    """
    counts = Counter((m.weight.dtype, Shape(*m.weight.shape, 1)) for m in layers if can_lay_out(m.weight))
    alone = {key for key, count in counts.items() if count == 1}
    won = {(dtype, shape) for dtype, shape in alone if panels_win((shape,), dtype, rows)}
    for dtype in {dtype for dtype, _ in counts.keys() - alone}:
        together = {key: count for key, count in counts.items() if key[0] == dtype and key not in alone}
        if panels_win(tuple(sorted(s._replace(count=c) for (_, s), c in together.items())), dtype, rows):
            won |= together.keys()
    return {m for m in layers if can_lay_out(m.weight) and (m.weight.dtype, Shape(*m.weight.shape, 1)) in won}


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the layers to lay out: unsharded ones on the CPU; none of a model that would not fit twice."""
    layers = [m for m in model.modules() if type(m) is nn.Linear and _is_plain(m.weight)]
    size = sum(m.weight.nbytes for m in layers)
    return [] if size > SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") else layers


def _is_plain(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and not hasattr(weight, "device_mesh")

"""Choose, by a measurement on this machine, between our products with laid-out weights and oneDNN's, for sampling.

On Zen 4 our products win; on processors with AMX, which oneDNN uses and we do not, they lose by four to seven times. So
both multiply weights of the model at hand (`measured_choice_cpu.py`).
"""

import functools
from typing import NamedTuple

import torch

from gspo.kernels.measured_choice_cpu import MUCH, Choices, Times, decide, ours_always, seconds
from gspo.kernels.onednn_linear_cpu import onednn_lay_out, onednn_linear, onednn_works
from gspo.kernels.panel_linear_cpu import laid_out_linear, lay_out

ENOUGH = 2**24  # weights of all layers; below, a step is made of calls more than of products, and ours take fewer
MOST_ROWS = 256
IN_ONE_CALL = (
    1.5  # oneDNN has to be so many times as fast where our products come with all layers of a step in one call
)


class Shape(NamedTuple):
    """Linear layers of one size."""

    outputs: int
    inputs: int
    count: int


def panels_win(shapes: tuple[Shape, ...], dtype: torch.dtype, rows: int) -> bool:
    """Return whether weights of these shapes are multiplied by `rows` rows with our kernel rather than with oneDNN.

    The kernel must take them (`can_lay_out`). GSPO_NATIVE=1 chooses it without a measurement.
    """
    if ours_always() or sum(n * k * count for n, k, count in shapes) < ENOUGH:
        return True
    rows = 1 << (min(rows, MOST_ROWS) - 1).bit_length()  # few different measurements
    return not onednn_works(dtype) or _decide(shapes, dtype, rows, torch.get_num_threads())


@functools.lru_cache
def _decide(shapes: tuple[Shape, ...], dtype: torch.dtype, rows: int, threads: int) -> bool:
    def describe(times: Times, found: Choices) -> str:
        flops = 2 * rows * sum(n * k * count for n, k, count in shapes)
        ours, theirs = (f"{flops / x / 1e9:.0f}" for x in times["products"])
        return (
            f"{rows} rows in {str(dtype)[6:]}: our products {ours} GFLOP/s, oneDNN's {theirs}: "
            f"sampling uses {'ours' if found['products'] else 'those'} (GSPO_NATIVE=1: ours always)"
        )

    what, layers = ["products", str(dtype), rows, *shapes], sum(count for _, _, count in shapes)
    much = IN_ONE_CALL if layers > 1 else MUCH
    return decide(what, lambda: {"products": measure(shapes, dtype, rows)}, describe, much)["products"]


@torch.no_grad()
def measure(shapes: tuple[Shape, ...], dtype: torch.dtype, rows: int) -> tuple[float, float]:
    """Return the seconds that all these layers take with our kernel and with oneDNN's."""
    ours, theirs, g = 0.0, 0.0, torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    for n, k, count in shapes:
        x, weight = (torch.randn(size, k, generator=g).to(dtype) for size in (rows, n))
        panels, other = lay_out(weight), onednn_lay_out(weight, rows)
        found = seconds(
            functools.partial(laid_out_linear, panels, n, None, x), functools.partial(onednn_linear, other, None, x)
        )
        ours, theirs = ours + count * found[0], theirs + count * found[1]
    return ours, theirs

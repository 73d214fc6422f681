"""Choose, by a measurement on this machine, between our products with laid-out weights and oneDNN's.

What an instruction set promises does not say which is faster: on Zen 4 our products win, on processors with AMX, which
oneDNN uses and we do not, they lose by four to seven times. So both multiply the weights of the model at hand, once on
a machine; what was found is kept in the user's cache folder, so that a run that is resumed computes as before.
"""

import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gspo.kernels.native import cache_folder, processor
from gspo.kernels.onednn_linear_cpu import onednn_lay_out, onednn_linear, onednn_works
from gspo.kernels.panel_linear_cpu import laid_out_linear, lay_out

ENOUGH = 2**24  # weights of all layers; below, a step is made of calls more than of products, and ours take fewer
MUCH = 1.1  # oneDNN has to be so many times as fast: our products come with a step of all layers in one call
REPEATS = 5
KEPT = "products.json"  # {key: whether ours won}
MOST_ROWS = 256


class Shape(NamedTuple):
    """Linear layers of one size."""

    outputs: int
    inputs: int
    count: int


def panels_win(shapes: tuple[Shape, ...], dtype: torch.dtype, rows: int) -> bool:
    """Return whether weights of these shapes are multiplied by `rows` rows with our kernel rather than with oneDNN.

    The kernel must take them (`can_lay_out`). GSPO_NATIVE=1 chooses it without a measurement.
    """
    if os.environ.get("GSPO_NATIVE") == "1" or sum(n * k * count for n, k, count in shapes) < ENOUGH:
        return True
    rows = 1 << (min(rows, MOST_ROWS) - 1).bit_length()  # few different measurements
    return not onednn_works(dtype) or _decide(shapes, dtype, rows, torch.get_num_threads())


@functools.lru_cache
def _decide(shapes: tuple[Shape, ...], dtype: torch.dtype, rows: int, threads: int) -> bool:
    """Return the choice that is kept for this machine, or measure, say and keep it."""
    what = [processor(), torch.__version__, str(dtype), rows, threads, *shapes]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    kept = _read().get(key)
    if kept is None:
        ours, theirs = measure(shapes, dtype, rows)
        kept = _keep(key, ours <= theirs * MUCH)
        flops = 2 * rows * sum(n * k * count for n, k, count in shapes)
        print(
            f"kernels/cpu: {rows} rows in {str(dtype)[6:]}: our products {flops / ours / 1e9:.0f} GFLOP/s, oneDNN's "
            f"{flops / theirs / 1e9:.0f}: sampling uses {'ours' if kept else 'those'} (GSPO_NATIVE=1: ours always)",
            file=sys.stderr,
            flush=True,
        )
    return kept


@torch.no_grad()
def measure(shapes: tuple[Shape, ...], dtype: torch.dtype, rows: int) -> tuple[float, float]:
    """Return the seconds that all these layers take with our kernel and with oneDNN's."""
    ours = theirs = 0.0
    for n, k, count in shapes:
        x, weight = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
        panels, other = lay_out(weight), onednn_lay_out(weight, rows)
        seconds = _seconds(
            functools.partial(laid_out_linear, panels, n, None, x), functools.partial(onednn_linear, other, None, x)
        )
        ours, theirs = ours + count * seconds[0], theirs + count * seconds[1]
    return ours, theirs


def _seconds(*products: Callable[[], Tensor]) -> list[float]:
    """Return the shortest time of each product, in turns, so that a busy moment meets both."""
    best = [float("inf")] * len(products)
    for _ in range(REPEATS + 1):  # the first turn finds cold caches
        for i, product in enumerate(products):
            began = time.perf_counter()
            product()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def _read() -> dict[str, bool]:
    """Return the choices that are kept; none where the file is missing or damaged."""
    try:
        found = json.loads((cache_folder() / KEPT).read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError, RecursionError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, bool)} if isinstance(found, dict) else {}


def _keep(key: str, choice: bool) -> bool:
    """Keep a choice and return it; where another process has kept one meanwhile, return that."""
    kept = {key: choice} | _read()  # the first one stays
    try:
        part = cache_folder() / f"products-{os.getpid()}.part"
        part.write_text(json.dumps(kept), encoding="utf-8")
        os.replace(part, cache_folder() / KEPT)
    except (OSError, RuntimeError):
        pass  # measured again by the next process
    return kept[key]

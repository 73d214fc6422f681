"""Cases of the kernels of layers, shared by the interpreter's tests and the GPU's: what is too far from float64.

A result may be as far from it as PyTorch's own operators are in the same dtype, plus an epsilon.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from gspo.kernels import norm_gate_rotary, write_tokens

FULL, HALF = torch.float32, torch.bfloat16
SLACK = {FULL: 1e-6, HALF: 4e-3}  # of the largest number: half a unit in the last place of bfloat16
DEVICE = ["cpu"]  # of the cases
Case = tuple[str, Callable[[], list[str]]]
generator = torch.Generator()


def numbers(*shape: int, dtype: torch.dtype = FULL, apart: int = 0) -> Tensor:
    """Random numbers; `apart`: rows are slices of rows that are so much wider."""
    wide = torch.randn(*shape[:-1], shape[-1] + apart, generator=generator).to(dtype).to(DEVICE[0])
    return wide[..., apart // 2 : apart // 2 + shape[-1]]


def outcome(function: Callable, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> list[Tensor]:
    """Results and gradients."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    found = function(*inputs)
    found = found if isinstance(found, tuple) else (found,)
    return [*found, *torch.autograd.grad(found, inputs, [g.to(y.dtype) for g, y in zip(grads, found, strict=True)])]


def too_far(mine: Callable, plain: Callable, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> list[str]:
    """Lines about results of `mine` that are farther from float64 than those of `plain` in the inputs' dtypes."""
    exact = outcome(plain, tuple(x.double() for x in inputs), tuple(x.double() for x in grads))
    theirs, ours = outcome(plain, inputs, grads), outcome(mine, inputs, grads)
    lines = []
    for k, (wanted, other, found) in enumerate(zip(exact, theirs, ours, strict=True)):
        size = 1 + float(wanted.detach().abs().max())
        slack = SLACK[min((found.dtype, inputs[0].dtype), key=lambda d: d.itemsize)] * size
        off, allowed = (float((x.double() - wanted).detach().abs().max()) for x in (found, other))
        if not off <= allowed + slack or found.shape != wanted.shape:
            lines.append(f"result {k}: off by {off:.3g}, PyTorch by {allowed:.3g}")
    return lines


def plain_norm(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    """What models compute: rounded to x's dtype before the weight is multiplied."""
    wide = x.to(torch.promote_types(x.dtype, FULL))
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (weight + offset) * scaled.to(x.dtype)


def norms() -> Iterator[Case]:
    for (shape, apart), dtypes, offset in product(
        [((1, 5), 0), ((70, 33), 0), ((3, 4, 3, 64), 32), ((5, 896), 16), ((2, 2049), 0)],
        [(FULL, FULL), (HALF, HALF), (FULL, HALF), (HALF, FULL)],
        [0.0, 1.0],
    ):
        x_dtype, y_dtype = dtypes
        weight_dtype = FULL if FULL in dtypes else HALF
        x = numbers(*shape, dtype=x_dtype, apart=apart)
        sizes = torch.logspace(-3, 2, shape[0], device=x.device)  # eps counts in some
        x = x * sizes.view(-1, *[1] * (len(shape) - 1)).to(x_dtype)
        x = F.pad(x, (1, 1))[..., 1:-1] if apart else x  # slices again
        weight, dy = numbers(shape[-1], dtype=weight_dtype), numbers(*shape, dtype=y_dtype)

        def mine(x: Tensor, weight: Tensor, offset: float = offset, dtype: torch.dtype = y_dtype) -> Tensor:
            return norm_gate_rotary.rms_norm(x, weight, 1e-5, offset, dtype)

        def plain(x: Tensor, weight: Tensor, offset: float = offset, dtype: torch.dtype = y_dtype) -> Tensor:
            y = plain_norm(x, weight, offset)
            return y if x.dtype == torch.float64 else y.to(dtype)

        yield f"norm {shape} {dtypes} {offset}", partial(too_far, mine, plain, (x, weight), (dy,))


def sums() -> Iterator[Case]:
    """Norms of x + branch: both results, and all three gradients."""
    for shape, dtypes in product([(3, 3, 40), (33, 129)], [(FULL, FULL), (FULL, HALF), (HALF, HALF)]):
        x_dtype, dtype = dtypes
        x, branch = numbers(*shape, dtype=x_dtype), numbers(*shape, dtype=dtype)
        weight = numbers(shape[-1], dtype=x_dtype)
        grads = numbers(*shape, dtype=x_dtype), numbers(*shape, dtype=dtype)

        def mine(x: Tensor, branch: Tensor, weight: Tensor, dtype: torch.dtype = dtype) -> tuple[Tensor, Tensor]:
            return norm_gate_rotary.add_rms_norm(x, branch, weight, 1e-5, 1.0, dtype)

        def plain(x: Tensor, branch: Tensor, weight: Tensor, dtype: torch.dtype = dtype) -> tuple[Tensor, Tensor]:
            total = x + branch
            y = plain_norm(total, weight, 1.0)
            return total, y if x.dtype == torch.float64 else y.to(dtype)

        yield f"sum and norm {shape} {dtypes}", partial(too_far, mine, plain, (x, branch, weight), grads)


def gates() -> Iterator[Case]:
    for (shape, apart), dtype in product([((3,), 0), ((5, 17), 0), ((2, 3, 1500), 0), ((7, 1025), 6)], [FULL, HALF]):
        gate, up = (4 * numbers(*shape, dtype=dtype, apart=apart) for _ in range(2))
        if apart:
            both = torch.cat([gate, up], -1)
            gate, up = both[..., : shape[-1]], both[..., shape[-1] :]
        gate[..., 0], gate[..., -1] = -200.0, 200.0
        dout = numbers(*shape, dtype=dtype)
        compare = partial(too_far, norm_gate_rotary.silu_product, lambda a, b: F.silu(a) * b, (gate, up), (dout,))
        yield f"gate {shape} {dtype}", compare


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


def rotations() -> Iterator[Case]:
    for (batch, heads, kv_heads, tokens, width), (dtype, angles), apart in product(
        [(1, 3, 1, 5, 16), (4, 14, 2, 1, 6), (2, 5, 5, 7, 96)], [(FULL, FULL), (HALF, FULL), (HALF, HALF)], [0, 10]
    ):
        q, k = (numbers(batch, tokens, n, width, dtype=dtype, apart=apart).transpose(1, 2) for n in (heads, kv_heads))
        cos, sin = (numbers(1 if heads == 3 else batch, tokens, width, dtype=angles) for _ in range(2))
        grads = numbers(*q.shape, dtype=dtype), numbers(*k.shape, dtype=dtype)
        compare = partial(
            too_far,
            lambda q, k, cos=cos, sin=sin: norm_gate_rotary.rotate(q, k, cos, sin),
            lambda q, k, cos=cos, sin=sin: (turned(q, cos, sin), turned(k, cos, sin)),
            (q, k), grads,
        )  # fmt: skip
        yield f"rotate {(batch, heads, kv_heads, tokens, width)} {dtype} {angles} {apart}", compare


def writes() -> Iterator[Case]:
    """Keys and values in pages, from slices of wider tensors."""
    for (tokens, heads, width, value_width), dtype in product([(1, 1, 5, 8), (9, 3, 64, 24)], [FULL, HALF]):
        keys, values = (numbers(tokens, heads, d, dtype=dtype, apart=6) for d in (width, value_width))
        pools = [numbers(7, heads, 4, d, dtype=dtype) for d in (width, value_width)]
        places = torch.randperm(7 * heads * 4, generator=generator)[: tokens * heads].to(keys.device)
        yield f"write {tokens} {heads} {dtype}", partial(differs, pools, places, keys, values)


def differs(pools: list[Tensor], places: Tensor, keys: Tensor, values: Tensor) -> list[str]:
    theirs, mine = ([x.clone() for x in pools] for _ in range(2))
    write_tokens.plain_write_tokens(*theirs, places, keys, values)
    write_tokens.write_tokens(*mine, places, keys, values)
    return [] if all(a.equal(b) for a, b in zip(mine, theirs, strict=True)) else ["other numbers"]


def cases(device: str, step: int = 1) -> list[Case]:
    """Every step-th case: its name, and a function that returns lines about what is wrong."""
    DEVICE[0] = device
    generator.manual_seed(0)
    return [case for kind in (norms, sums, gates, rotations, writes) for case in kind()][::step]

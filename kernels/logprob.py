"""Compute log-probs of tokens from the hidden states and the head's weight, without holding [T, V] logits.

The vocabulary is cut into chunks. Forward: the raw products of one chunk at a time go through a buffer, and three
numbers a token are carried along (`logprob_chunk.py`). Backward: the products are computed again, turned into the
loss's gradient with respect to them, `d`, and then `dhidden += d @ weight[chunk]` in float32 and
`dweight[chunk] = d.T @ hidden`, written once. That is 8 T D V floating-point operations; with unlimited memory it
would be 6. The forward keeps the first products, up to `keep` bytes, for the backward, so that small problems and
machines with much memory are spared the recomputation.

Cutting the tokens instead (as Liger does) reads and writes all of dweight once a piece, which costs more than the
recomputation from about a thousand tokens on. It pays where the loss's gradient is known as soon as a piece's log-probs
are: `linear_logprob_and_grad`.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from gspo.kernels import logprob_chunk, logprob_chunk_cpu
from gspo.kernels.amx_nan_guard import columns_of, whole_tiles
from gspo.kernels.dispatch import Implementation, always, choose, on_cuda, triton_kernel
from gspo.kernels.logprob_chunk import LogitTransform
from gspo.kernels.native import TYPES, cpu_kernels_take
from gspo.kernels.training_choice_cpu import kernel_wins

MIB = 2**20
CHUNK_BYTES = {"cpu": 32 * MIB, "cuda": 128 * MIB}  # one chunk of raw products
LEAST_WIDTH = {"cpu": 512, "cuda": 4096}  # vocabulary entries of a chunk; with fewer, matrix products slow down
KEEP_BYTES = {"cpu": 192 * MIB, "cuda": 768 * MIB}  # raw products kept for the backward
ALIGN = 128  # elements; rows of a chunk begin at multiples of it
LEAST_PIECE = 64  # tokens

Slope = Callable[[Tensor, slice], Tensor]


class Plan(NamedTuple):
    """What forward and backward need beside the tensors."""

    transform: LogitTransform
    dtype: torch.dtype  # of the matrix products
    keep: int  # bytes
    functions: ModuleType  # logprob_chunk, logprob_chunk_cpu or logprob_chunk_triton


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    keep: int | None = None,
) -> Tensor:
    """Return log softmax(z)[target] of each token: hidden [T, D], weight [V, D], targets [T], bias [V] -> [T].

    z = softcap * tanh(scale * y / softcap) / temperature, or scale * y / temperature without a cap, where
    y = hidden @ weight.T + bias. The result is float32 (float64 for float64 inputs) and differentiable with respect to
    hidden, weight and bias. Matrix products run in the inputs' dtype, or autocast's; sums over tokens and vocabulary in
    float32. `keep` limits the products held for the backward, in bytes (default: KEEP_BYTES); one chunk is held in
    addition. weight must be a plain tensor: under FSDP2 call this inside a forward method, where it is gathered.
    """
    hidden, weight = _inputs(hidden, weight, bias)
    plan = _plan(hidden, weight, targets, LogitTransform.of(scale, softcap, temperature), keep)
    return _LinearLogprob.apply(hidden, weight, targets.contiguous(), plan)


def linear_logprob_and_grad(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    slope: Slope,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    keep: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (surrogate, log-prob [T]) for a loss that is a sum over tokens, gradients already computed: 6 T D V.

    Takes the arguments of `linear_logprob`, and `slope(logprob [P], rows)`, which returns dL/dlogprob [P] of the tokens
    `rows` of hidden, one piece at a time; constant coefficients are `lambda logprob, rows: coefficients[rows]`. Only
    the surrogate, sum slope * log-prob, has a gradient: the loss's. Its backward can run once.

    If the weight is float32, tokens are cut into pieces whose products fit in `keep` bytes. A bfloat16 dweight cannot
    be summed piece by piece without rounding: then the tokens stay together, and what does not fit is recomputed.
    """
    hidden, weight = _inputs(hidden, weight, bias)
    plan = _plan(hidden, weight, targets, LogitTransform.of(scale, softcap, temperature), keep)
    return _LinearLogprobAndGrad.apply(hidden, weight, targets.contiguous(), slope, plan)


def _inputs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return hidden and weight, the bias as one more column of the weight, times a hidden 1: a copy, but few heads
    have one."""
    if not torch.is_grad_enabled():  # an autograd.Function does not see no_grad
        hidden, weight = hidden.detach(), weight.detach()
    if bias is None:
        return whole_tiles(hidden), whole_tiles(weight)
    one = torch.zeros(8, dtype=weight.dtype, device=weight.device)  # eight columns keep rows aligned
    one[0] = 1.0
    columns = bias.to(weight.dtype)[:, None] * one
    return torch.cat([hidden, one.to(hidden.dtype).expand(len(hidden), 8)], 1), torch.cat([weight, columns], 1)


def _plan(hidden: Tensor, weight: Tensor, targets: Tensor, transform: LogitTransform, keep: int | None) -> Plan:
    assert hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1], (hidden.shape, weight.shape)
    assert targets.shape == hidden.shape[:1] and targets.dtype == torch.int64, (targets.shape, targets.dtype)
    assert not hasattr(weight, "device_mesh"), "a sharded weight: enter through an FSDP forward method"
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        assert weight.dtype == dtype, (hidden.dtype, weight.dtype)
    keep = _for_device(KEEP_BYTES, device) if keep is None else keep
    return Plan(transform, dtype, keep, choose(IMPLEMENTATIONS, hidden, dtype))


def _compiled(hidden: Tensor, dtype: torch.dtype) -> bool:
    return dtype in TYPES and cpu_kernels_take(hidden) and kernel_wins("log-probs", dtype)


IMPLEMENTATIONS = (  # of a chunk's processing, for `hidden` and products in `dtype`
    Implementation(on_cuda, triton_kernel("logprob_chunk_triton")),
    Implementation(_compiled, lambda hidden, dtype: logprob_chunk_cpu),
    Implementation(always, lambda hidden, dtype: logprob_chunk),
)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, plan: Plan):
        needed = any(ctx.needs_input_grad)
        work = _workspace(len(hidden), weight, plan, plan.keep if needed else 0)
        logprob, norm = _forward(hidden.to(plan.dtype), weight, targets, plan, work)
        if needed:
            ctx.save_for_backward(hidden, weight, targets, norm)
            ctx.plan, ctx.work = plan, work
        return logprob

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, weight, targets, norm = ctx.saved_tensors
        plan, work, ctx.work = ctx.plan, ctx.work, None
        if work is None:  # a second backward: the first has overwritten the products
            work = _workspace(len(hidden), weight, plan, 0)
        rows = _gradient_rows(norm, grad, plan.transform)
        dx = torch.zeros_like(hidden, dtype=norm.dtype) if ctx.needs_input_grad[0] else None
        dw = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        _backward(hidden.to(plan.dtype), weight, targets, rows, plan, work, dx, dw, add=False)
        return None if dx is None else dx.to(hidden.dtype), dw, None, None


class _LinearLogprobAndGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, slope: Slope, plan: Plan):
        need_x, need_w = ctx.needs_input_grad[:2]
        dx = torch.empty_like(hidden) if need_x else None
        dw = torch.empty_like(weight) if need_w else None
        pieces, keep = _pieces(len(hidden), weight, plan)
        work = _workspace(pieces[0].stop, weight, plan, keep if need_x or need_w else 0)
        logprobs, surrogate = [], 0.0
        for k, rows in enumerate(pieces):
            x, where = hidden[rows].to(plan.dtype), targets[rows]
            logprob, norm = _forward(x, weight, where, plan, work)
            grad = slope(logprob, rows)
            assert grad.shape == logprob.shape, (grad.shape, logprob.shape)
            surrogate = surrogate + (grad * logprob).sum()
            if need_x or need_w:
                total = torch.zeros_like(x, dtype=norm.dtype) if need_x else None
                numbers = _gradient_rows(norm, grad, plan.transform)
                _backward(x, weight, where, numbers, plan, work, total, dw, add=k > 0)
                if need_x:
                    dx[rows] = total
            logprobs.append(logprob)
        ctx.grads = dx, dw
        logprob = torch.cat(logprobs)
        ctx.mark_non_differentiable(logprob)
        return surrogate, logprob

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, *_):
        assert ctx.grads is not None, "the first backward has used up the gradients"
        (dx, dw), ctx.grads = ctx.grads, None
        if grad != 1.0:  # waits for the GPU, which takes less than a pass over dweight
            for d in (dx, dw):
                if d is not None:
                    d.mul_(grad)
        return dx, dw, None, None, None


class Workspace(NamedTuple):
    """The memory of raw products: a buffer for each of the first `kept` chunks, and one more that the others share."""

    edges: list[tuple[int, int]]  # each chunk's first entry of the vocabulary, and the one after its last
    buffers: Tensor  # [kept, or kept + 1, most tokens, widest chunk]
    kept: int


def _workspace(tokens: int, weight: Tensor, plan: Plan, keep: int) -> Workspace:
    """Cut the vocabulary into chunks of nearly equal widths, and keep as many as fit in `keep` bytes."""
    vocabulary, device = len(weight), weight.device.type
    row = max(tokens, 1) * plan.dtype.itemsize
    width = max(_for_device(CHUNK_BYTES, device) // row, _for_device(LEAST_WIDTH, device))
    width = -(-vocabulary // -(-vocabulary // width))  # the same number of chunks, evenly
    width = -(-width // ALIGN) * ALIGN
    edges = [(a, min(a + width, vocabulary)) for a in range(0, vocabulary, width)]
    kept = min(keep // (row * width), len(edges))
    count = min(kept + 1, len(edges))
    return Workspace(edges, weight.new_empty(count, tokens, width, dtype=plan.dtype), kept)


def _pieces(tokens: int, weight: Tensor, plan: Plan) -> tuple[list[slice], int]:
    """Return runs of tokens whose raw products take about plan.keep bytes, and the bytes to keep of each run."""
    if weight.dtype != torch.promote_types(weight.dtype, torch.float32):
        return [slice(0, tokens)], plan.keep
    most = max(plan.keep // (len(weight) * plan.dtype.itemsize), LEAST_PIECE)
    count = max(-(-tokens // most), 1)
    size = -(-tokens // count)
    return [slice(a, min(a + size, tokens)) for a in range(0, max(tokens, 1), max(size, 1))], 2**63


def _forward(x: Tensor, weight: Tensor, targets: Tensor, plan: Plan, work: Workspace) -> tuple[Tensor, Tensor]:
    """Return log-probs [T] of x [T, D], and (m, log s) [2, T]. The workspace keeps the products it has room for."""
    stats = logprob_chunk.new_stats(len(x), x)
    for k, (begin, end) in enumerate(work.edges):
        raw = _product(x, weight, begin, end, work.buffers[min(k, work.kept)])
        plan.functions.add_statistics(raw, begin, targets, stats, plan.transform)
    m, s, t = stats
    log_s = s.log()
    return (t - m) - log_s, torch.stack([m, log_s])


def _backward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    plan: Plan,
    work: Workspace,
    dx: Tensor | None,
    dw: Tensor | None,
    add: bool,
) -> None:
    """Add to dx [T, D] (float32), and to dw [V, D] if `add`, else write it. Kept products are overwritten."""
    for k, (begin, end) in enumerate(work.edges):
        if k < work.kept:
            raw = work.buffers[k, : len(x), : end - begin]
        else:
            raw = _product(x, weight, begin, end, work.buffers[work.kept])
        plan.functions.to_gradient(raw, begin, targets, rows, plan.transform)
        if dx is not None:
            _add_product(dx, raw, weight[begin:end].to(x.dtype))
        if dw is not None:
            (_add_product if add else _set_product)(dw[begin:end], raw.t(), x)


def _product(x: Tensor, weight: Tensor, begin: int, end: int, buffer: Tensor) -> Tensor:
    """Write x @ weight[begin:end].T to a corner of the buffer: its rows will be an operand of the next product."""
    return torch.mm(x, weight[begin:end].to(x.dtype).t(), out=columns_of(buffer, len(x), end - begin))


def _gradient_rows(norm: Tensor, grad: Tensor, transform: LogitTransform) -> Tensor:
    """Return the numbers [3, T] that `to_gradient` reads of each token, from (m, log s) [2, T] and dL/dlogprob [T]."""
    return torch.stack([*norm, transform.inner * transform.outer * grad.to(norm.dtype)])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute total += a @ b, summed in total's precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b))


def _set_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute out = a @ b, rounded once."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _for_device(table: dict[str, int], device: str) -> int:
    return table.get(device, table["cuda"])

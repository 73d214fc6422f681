"""Compute the functions of `norm_gate_rotary.py` in Triton, one launch each.

All are bound by memory bandwidth: every tensor is read or written once, 16 bytes a thread where its rows allow it;
arithmetic is float32, rounded where a result is stored. Rows may be slices of a wider tensor, as heads are of a product
that gives queries, keys and values together. Widths need not be powers of two: programs hold them padded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # numbers that a program of a norm holds, at least, if there are as many
GATES = 1024  # numbers of a program of the gated activation
PROGRAMS = 1024  # of a norm's backward, at most: each leaves a part of the weight's gradient, [D]


# ---- RMSNorm ----


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x_ptr, branch_ptr, weight_ptr, total_ptr, y_ptr, scale_ptr,
    rows, width, inner, x_outer, x_inner, eps, offset,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalize ROWS rows; with ADD those of x + branch, which are written to total. Row r of x begins at
    r // inner * x_outer + r % inner * x_inner; branch is contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    real = (row < rows)[:, None] & (col < width)[None, :]
    at = (row // inner * x_outer + row % inner * x_inner)[:, None] + col[None, :]
    to = row[:, None] * width + col[None, :]
    x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(branch_ptr + to, mask=real, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)  # as the next layer reads it
        tl.store(total_ptr + to, rounded, mask=real)
        x = rounded.to(tl.float32)
    w = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32) + offset
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    y = x * scale[:, None] * w[None, :]
    tl.store(y_ptr + to, y.to(y_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows", "tiles"])
def norm_back_kernel(
    dy_ptr, x_ptr, weight_ptr, scale_ptr, dtotal_ptr, dx_ptr, dbranch_ptr, dweight_ptr,
    rows, tiles, width, inner, x_outer, x_inner, offset,
    ADD: tl.constexpr, TWICE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute dx of every n-th tile of ROWS rows, and a part of dweight; with ADD dx gets dtotal added, and with TWICE
    it is written to dbranch as well. dy and dtotal are contiguous."""
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    w = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros([BLOCK], tl.float32)
    for tile in range(program, tiles, tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        real = (row < rows)[:, None] & (col < width)[None, :]
        at = (row // inner * x_outer + row % inner * x_inner)[:, None] + col[None, :]
        to = row[:, None] * width + col[None, :]
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
        n = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32) * scale[:, None]
        grad = tl.load(dy_ptr + to, mask=real, other=0.0).to(tl.float32)
        dweight += tl.sum(grad * n, 0)
        weighted = grad * w[None, :]
        mean = tl.sum(weighted * n, 1) / width
        dx = (weighted - n * mean[:, None]) * scale[:, None]
        if ADD:
            dx += tl.load(dtotal_ptr + to, mask=real, other=0.0).to(tl.float32)
        tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask=real)
        if TWICE:
            tl.store(dbranch_ptr + to, dx.to(dbranch_ptr.dtype.element_ty), mask=real)
    tl.store(dweight_ptr + program * width + col, dweight, mask=col < width)


def norm_blocks(width: int) -> dict[str, int]:
    """Return the sizes of a program for rows of this width: several short rows, or a long one."""
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(32, max(4, rows * block // 512))}


def _rows(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Return x [..., D] with (inner, outer stride, inner stride): how rows lie, copied only if not by two strides."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    if x.is_contiguous() or x.ndim < 3:
        return x, (1, x.stride(-2) if x.ndim > 1 and not x.is_contiguous() else x.shape[-1], 0)
    x = x.reshape(-1, *x.shape[-2:])
    return x, (x.shape[1], x.stride(0), x.stride(1))


def norm(x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return y [..., D] in `dtype` and 1 / sqrt(mean(x^2) + eps) [...]."""
    _, y, scale = _norm(x, None, weight, eps, offset, dtype)
    return y, scale


def add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x + branch, its norm in `dtype`, and the norm's scale."""
    return _norm(x, branch, weight, eps, offset, dtype)


def _norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor]:
    width, shape = x.shape[-1], x.shape
    y = torch.empty(shape, dtype=dtype, device=x.device)
    scale = torch.empty(shape[:-1], dtype=torch.float32, device=x.device)
    total = None
    if branch is not None:
        assert branch.shape == shape
        total = torch.empty(shape, dtype=torch.promote_types(x.dtype, branch.dtype), device=x.device)
        x, branch = x.contiguous(), branch.contiguous()
    x, where = _rows(x)
    sizes, rows = norm_blocks(width), scale.numel()
    with torch.cuda.device_of(x):
        norm_kernel[(triton.cdiv(rows, sizes["ROWS"]),)](
            x, branch, weight, total, y, scale, rows, width, *where, eps, offset,
            ADD=branch is not None, **sizes,
        )  # fmt: skip
    return total, y, scale


def norm_back(dy: Tensor, x: Tensor, weight: Tensor, offset: float, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients (dx, dweight [P, D])."""
    dx, _, dweight = _norm_back(None, dy, x, weight, offset, scale, x.dtype, x.dtype)
    return dx, dweight


def add_norm_back(
    dtotal: Tensor, dy: Tensor, total: Tensor, weight: Tensor, offset: float, scale: Tensor,
    x_dtype: torch.dtype, branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients (dx, dbranch, dweight [P, D])."""
    return _norm_back(dtotal, dy, total, weight, offset, scale, x_dtype, branch_dtype)


def _norm_back(
    dtotal: Tensor | None, dy: Tensor, x: Tensor, weight: Tensor, offset: float, scale: Tensor,
    x_dtype: torch.dtype, branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    width, dy = x.shape[-1], dy.contiguous()
    dx = torch.empty(x.shape, dtype=x_dtype, device=x.device)
    dbranch = dx if branch_dtype == x_dtype else torch.empty(x.shape, dtype=branch_dtype, device=x.device)
    x, where = _rows(x)
    sizes, rows = norm_blocks(width), scale.numel()
    tiles = triton.cdiv(rows, sizes["ROWS"])
    programs = min(tiles, PROGRAMS)
    dweight = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        norm_back_kernel[(programs,)](
            dy, x, weight, scale, None if dtotal is None else dtotal.contiguous(), dx, dbranch, dweight,
            rows, tiles, width, *where, offset,
            ADD=dtotal is not None, TWICE=dbranch is not dx, **sizes,
        )  # fmt: skip
    return dx, dbranch, dweight


# ---- the gated activation ----


@triton.jit(do_not_specialize=["blocks"])
def silu_kernel(gate_ptr, up_ptr, out_ptr, width, blocks, gate_row, up_row, BLOCK: tl.constexpr):
    """Compute silu(gate) * up of BLOCK numbers of a row; rows of gate and up begin at multiples of their strides."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    real = col < width
    a = tl.load(gate_ptr + row * gate_row + col, mask=real, other=0.0).to(tl.float32)
    b = tl.load(up_ptr + row * up_row + col, mask=real, other=0.0).to(tl.float32)
    out = a / (1.0 + tl.exp(-a)) * b
    tl.store(out_ptr + row * width + col, out.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["blocks"])
def silu_back_kernel(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, width, blocks, gate_row, up_row, BLOCK: tl.constexpr
):
    """Compute the gradients of BLOCK numbers of a row; dout, dgate and dup are contiguous."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    real = col < width
    a = tl.load(gate_ptr + row * gate_row + col, mask=real, other=0.0).to(tl.float32)
    b = tl.load(up_ptr + row * up_row + col, mask=real, other=0.0).to(tl.float32)
    d = tl.load(dout_ptr + row * width + col, mask=real, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-a))
    dgate = d * b * s * (1.0 + a * (1.0 - s))
    tl.store(dgate_ptr + row * width + col, dgate.to(dgate_ptr.dtype.element_ty), mask=real)
    tl.store(dup_ptr + row * width + col, (d * a * s).to(dup_ptr.dtype.element_ty), mask=real)


def _as_rows(x: Tensor) -> Tensor:
    """Return x [..., D] as rows [R, D], copied only if they are not by one stride."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])


def silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    assert gate.shape == up.shape and gate.dtype == up.dtype
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = _as_rows(gate), _as_rows(up)
    rows, width = gate.shape
    blocks = triton.cdiv(width, GATES)
    with torch.cuda.device_of(gate):
        silu_kernel[(rows * blocks,)](
            gate, up, out, width, blocks, gate.stride(0), up.stride(0), BLOCK=GATES, num_warps=4
        )
    return out


def silu_back(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients (dgate, dup)."""
    dgate, dup = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
    gate, up = _as_rows(gate), _as_rows(up)
    rows, width = gate.shape
    blocks = triton.cdiv(width, GATES)
    with torch.cuda.device_of(gate):
        silu_back_kernel[(rows * blocks,)](
            dout.contiguous(), gate, up, dgate, dup, width, blocks, gate.stride(0), up.stride(0),
            BLOCK=GATES, num_warps=4,
        )  # fmt: skip
    return dgate, dup


# ---- rotary positions ----


@triton.jit
def _rotate_heads(
    from_ptr, to_ptr, head_stride, cos_low, cos_high, sin_low, sin_high,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Rotate all heads of a token; those of the result are contiguous."""
    head = tl.arange(0, BLOCK_HEADS)
    col = tl.arange(0, BLOCK)
    real = (head < HEADS)[:, None] & (col < HALF)[None, :]
    at = from_ptr + head[:, None] * head_stride + col[None, :]
    low = tl.load(at, mask=real, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=real, other=0.0).to(tl.float32)
    if BACK:
        first = low * cos_low[None, :] + high * sin_high[None, :]
        second = high * cos_high[None, :] - low * sin_low[None, :]
    else:
        first = low * cos_low[None, :] - high * sin_low[None, :]
        second = high * cos_high[None, :] + low * sin_high[None, :]
    to = to_ptr + head[:, None] * (2 * HALF) + col[None, :]
    tl.store(to, first.to(to_ptr.dtype.element_ty), mask=real)
    tl.store(to + HALF, second.to(to_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["tokens"])
def rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_to_ptr, k_to_ptr, tokens, cos_batch,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Rotate queries and keys of one token [B, H, T, 2 HALF], given by strides, to [B, T, H, 2 HALF]."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    col = tl.arange(0, BLOCK)
    angle = batch * cos_batch + token * (2 * HALF) + col
    cos_low = tl.load(cos_ptr + angle, mask=col < HALF, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + angle + HALF, mask=col < HALF, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + angle, mask=col < HALF, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + angle + HALF, mask=col < HALF, other=0.0).to(tl.float32)
    _rotate_heads(
        q_ptr + batch * q_batch + token * q_token, q_to_ptr + row * (HEADS * 2 * HALF), q_head,
        cos_low, cos_high, sin_low, sin_high, HEADS, BLOCK_HEADS, HALF, BLOCK, BACK,
    )  # fmt: skip
    _rotate_heads(
        k_ptr + batch * k_batch + token * k_token, k_to_ptr + row * (KV_HEADS * 2 * HALF), k_head,
        cos_low, cos_high, sin_low, sin_high, KV_HEADS, BLOCK_KV_HEADS, HALF, BLOCK, BACK,
    )  # fmt: skip


def rotate_blocks(heads: int, kv_heads: int, width: int) -> dict[str, int]:
    """Return the sizes of a program, which rotates a token's `heads` queries and `kv_heads` keys of `width` numbers."""
    padded, half = triton.next_power_of_2(heads), triton.next_power_of_2(width // 2)
    return {
        "HEADS": heads,
        "BLOCK_HEADS": padded,
        "KV_HEADS": kv_heads,
        "BLOCK_KV_HEADS": triton.next_power_of_2(kv_heads),
        "HALF": width // 2,
        "BLOCK": half,
        "num_warps": min(16, max(1, padded * half // 256)),
    }


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, back: bool) -> tuple[Tensor, Tensor]:
    """Return q and k rotated, in `dtype`; `back`: by the transposed map."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, heads, tokens, width = q.shape
    turned = [torch.empty(batch, tokens, x.shape[1], width, dtype=dtype, device=q.device) for x in (q, k)]
    with torch.cuda.device_of(q):
        rotate_kernel[(batch * tokens,)](
            q, k, cos, sin, *turned, tokens, cos.stride(0) if len(cos) > 1 else 0, *q.stride()[:3], *k.stride()[:3],
            BACK=back, **rotate_blocks(heads, k.shape[1], width),
        )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in turned)

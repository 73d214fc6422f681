"""Compute `decode_attention.py` in Triton: a kernel attends to a pool of pages, another merges parts.

Bound by memory bandwidth. A program holds up to BLOCK_M queries, those of a KV head's query heads and of the slots
that read the same sequence, and goes over a share of the keys, which are read once and multiplied on tensor cores
(float32 as three products of TF32 parts, which keep all but its last bit or two; wide float32 heads without tensor
cores; as one product of TF32 where PyTorch may round so). Grids depend on the tables' shapes, never on their contents:
a program with an empty share writes -inf and ends.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspo.kernels.decode_types import Pool
from gspo.kernels.logprob_chunk import LogitTransform
from gspo.kernels.logprob_chunk_triton import shaped

QUERIES = 64  # at most, of a program
SHARE = 256  # keys of a program, at least
SPLITS = 8, 32  # programs of a sequence, at most: of many sequences, and of so few that they leave processors idle
LN2 = math.log(2)


@triton.jit(do_not_specialize=["window", "table", "splits", "first_split", "all_splits"])
def part_kernel(
    q_ptr, keys_ptr, values_ptr, pages_ptr, members_ptr, sizes_ptr, starts_ptr, positions_ptr, out_ptr, lse_ptr,
    q_slot, q_head, inner, outer, window, table, splits, first_split, all_splits,
    MEMBERS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, SHARE: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Attend to a share of a sequence. Grid (sequences * blocks of queries, KV heads, splits).

    Writes out [S, H, all_splits, DV] and lse [S, H, all_splits], base 2, from `first_split` on; for an empty share lse
    only.
    """
    BLOCKS: tl.constexpr = (MEMBERS * GROUP + BLOCK_M - 1) // BLOCK_M
    sequence = tl.program_id(0) // BLOCKS
    head = tl.program_id(1)
    split = tl.program_id(2)
    row = (tl.program_id(0) % BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tl.load(members_ptr + sequence * MEMBERS + row // GROUP, mask=row < MEMBERS * GROUP, other=-1)
    real = slot >= 0
    query = head * GROUP + row % GROUP
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)

    size = tl.load(sizes_ptr + sequence)
    share = tl.maximum(SHARE, ((size + splits - 1) // splits + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
    begin = split * share
    end = tl.minimum(begin + share, size)
    first = tl.zeros([BLOCK_M], tl.int32)  # the first key that a query sees
    if WINDOW:
        first = tl.load(positions_ptr + slot, mask=real, other=0) - window + 1 - tl.load(starts_ptr + sequence)
        least = tl.maximum(tl.min(tl.where(real, first, 2147483647), 0), 0)
        begin = tl.maximum(begin, tl.minimum(least, size) // BLOCK_N * BLOCK_N)
    if tl.max(slot, 0) < 0:
        end = begin

    q_at = slot.to(tl.int64) * q_slot + query * q_head
    q = tl.load(q_ptr + q_at[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    top = tl.full([BLOCK_M], -1e30, tl.float32)  # finite, so that a row that sees no key gives no NaN
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        inside = at < end
        if PAGE % BLOCK_N == 0:
            page = tl.load(pages_ptr + sequence * table + start // PAGE).to(tl.int64)
        else:
            page = tl.load(pages_ptr + sequence * table + at // PAGE, mask=inside, other=0).to(tl.int64)
        token = (page * KV_HEADS + head) * PAGE + at % PAGE
        k = tl.load(keys_ptr + token[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(
            values_ptr + token[:, None] * DV + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0.0
        )
        scores, _ = shaped(tl.dot(q, tl.trans(k), input_precision=PRECISION), inner, outer, CAPPED)
        seen = inside[None, :]
        if WINDOW:
            seen = seen & (at[None, :] >= first[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        peak = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - peak[:, None])
        fade = tl.exp2(top - peak)
        total = total * fade + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * fade[:, None], input_precision=PRECISION)
        top = peak

    found = real & (total > 0.0)
    where = (slot.to(tl.int64) * (KV_HEADS * GROUP) + query) * all_splits + first_split + split
    total = tl.where(found, total, 1.0)
    tl.store(lse_ptr + where, tl.where(found, top + tl.log2(total), -float("inf")), mask=real)
    at = out_ptr + where[:, None] * DV + dv[None, :]
    tl.store(at, out / total[:, None], mask=found[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    out_ptr, lse_ptr, merged_ptr, splits, DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """Merge out [S * H, splits, DV] by lse [S * H, splits], base 2, to merged [S * H, DV]. One program a query."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_SPLITS)
    dv = tl.arange(0, BLOCK_DV)
    lse = tl.load(lse_ptr + row * splits + split, mask=split < splits, other=-float("inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    found = (lse > -float("inf"))[:, None] & (dv < DV)[None, :]
    out = tl.load(out_ptr + (row * splits + split)[:, None] * DV + dv[None, :], mask=found, other=0.0)
    merged = tl.sum(out * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(merged_ptr + row * DV + dv, merged.to(merged_ptr.dtype.element_ty), mask=dv < DV)


@cache
def processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors of a GPU; 0 of a CPU, where the kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def split_count(pool: Pool, processors: int) -> int:
    """Return the number of programs among which the longest sequence that fits in the tables is split.

    Few sequences are split further, until each processor has two programs.
    """
    pages, members = pool.readers.pages, pool.readers.members
    kv_heads, page = pool.keys.shape[1:3]
    programs = triton.cdiv(len(pages), members.shape[1]) * kv_heads  # without splits, if all tables are full
    least, most = SPLITS
    wanted = min(most, max(least, 2 * processors // programs))
    return min(wanted, triton.cdiv(pages.shape[1] * page, SHARE))


def merge_warps(splits: int, width: int) -> int:
    """Return the warps that merge `splits` parts of this width, both powers of two: at most 128 numbers a thread."""
    return max(1, splits * width // 4096)


def blocks(queries: int, page: int, width: int, value_width: int, itemsize: int) -> dict[str, int | str]:
    """Return the sizes of a program for sequences with `queries` queries. Tensor cores take 16 rows at least."""
    d, dv = (max(16, triton.next_power_of_2(x)) for x in (width, value_width))
    most, n = (QUERIES, 64 if max(d, dv) <= 128 else 32) if itemsize == 2 else (16, 16)  # float32 in three parts each
    m = min(most, max(16, triton.next_power_of_2(queries)))
    n = min(n, max(16, page & -page))  # within one page, if page sizes are powers of two
    precision = "tf32x3" if max(d, dv) <= 128 else "ieee"
    if torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    warps = 8 if m * max(d, dv) >= 64 * 128 or itemsize * max(d, dv) > 512 else 4
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_D": d,
        "BLOCK_DV": dv,
        "PRECISION": precision,
        "num_warps": warps,
        "num_stages": 2,
    }


def decode_attention(
    q: Tensor,
    prompts: Pool,
    answers: Pool,
    positions: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute `decode.decode_attention`. The heads of q may be slices of a wider tensor: nothing is copied."""
    q = q if q.stride(2) == 1 else q.contiguous()
    slots, heads, width = q.shape
    value_width = answers.values.shape[3]
    first_answer, own = (split_count(pool, processors(q.device)) for pool in (prompts, answers))
    every = first_answer + own
    transform = LogitTransform.of(scale, softcap, LN2)  # scores in base 2
    out = torch.empty(slots, heads, every, value_width, device=q.device)
    lse = torch.empty(slots, heads, every, device=q.device)
    merged = torch.empty(slots, heads, value_width, dtype=q.dtype, device=q.device)
    with torch.cuda.device_of(q):
        for pool, first, splits in ((prompts, 0, first_answer), (answers, first_answer, own)):
            keys, values, (pages, members, sizes, starts) = pool
            kv_heads, page = keys.shape[1:3]
            queries = members.shape[1] * heads // kv_heads
            sized = blocks(queries, page, width, value_width, keys.element_size())
            grid = (len(pages) * triton.cdiv(queries, sized["BLOCK_M"]), kv_heads, splits)
            part_kernel[grid](
                q, keys, values, pages, members, sizes, starts, positions, out, lse,
                q.stride(0), q.stride(1), transform.inner, transform.outer, window or 0,
                pages.shape[1], splits, first, every,
                MEMBERS=members.shape[1], KV_HEADS=kv_heads, GROUP=heads // kv_heads, PAGE=page,
                D=width, DV=value_width, SHARE=SHARE, CAPPED=transform.capped, WINDOW=window is not None, **sized,
            )  # fmt: skip
        block, wide = triton.next_power_of_2(every), triton.next_power_of_2(value_width)
        merge_kernel[(slots * heads,)](
            out, lse, merged, every, DV=value_width, BLOCK_SPLITS=block, BLOCK_DV=wide,
            num_warps=merge_warps(block, wide),
        )  # fmt: skip
    return merged

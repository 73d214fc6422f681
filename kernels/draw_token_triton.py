"""Draw tokens in Triton as `draw_token.py` says: one pass over the logits for statistics; truncation needs more."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # entries that are summed in float32 before float64 takes over
PER_CHUNK = 16  # blocks
LOWEST = tl.constexpr(-1e30)  # top of a chunk whose logits are all -inf
PIECE = 4096  # entries of a row at a time, in the passes that search a threshold
LOW_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # trailing bits that are 0 in such a float32


@triton.jit
def _mix(x):
    """Hash 32 bits in an int64 with lowbias32, as gspo/rollout/draw_tokens.py does."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


@triton.jit
def _fold(state, value):
    return _mix((state * 0x9E3779B1 + _mix(value & 0xFFFFFFFF) + 0x85EBCA6B) & 0xFFFFFFFF)


@triton.jit
def uniform(key, position):
    """Return a float64 on (0, 1) with the same bits as `uniforms` of gspo/rollout/draw_tokens.py."""
    bits = (_fold(key, 2 * position) << 21) ^ _fold(key, 2 * position + 1)
    return (bits.to(tl.float64) + 0.5) / 9007199254740992.0


@triton.jit
def _tempered(raw, temperature):
    raw = raw.to(tl.float32)
    return tl.div_rn(raw, tl.zeros_like(raw) + temperature)


@triton.jit
def _top(tops_ptr, row, chunks, CHUNKS: tl.constexpr):
    chunk = tl.arange(0, CHUNKS)
    return tl.max(tl.load(tops_ptr + row * chunks + chunk, mask=chunk < chunks, other=LOWEST), 0)


@triton.jit(do_not_specialize=["chunks"])
def sums_kernel(
    logits_ptr, least_ptr, tops_ptr, totals_ptr, bends_ptr, sums_ptr, size, stride, chunks, temperature,
    TRUNCATED: tl.constexpr, CHUNKS: tl.constexpr, PER_CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the statistics of a chunk. Grid (S * chunks).

    Writes tops, totals (sums of w) and bends (sums of w (z - top)) [S, chunks], relative to the chunk's own top, and
    the block sums [S, chunks * PER_CHUNK]; if TRUNCATED only the block sums, of the tokens that are kept.
    """
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    block = tl.arange(0, PER_CHUNK)
    cols = (chunk * PER_CHUNK + block)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    raw = tl.load(logits_ptr + row * stride + cols, mask=cols < size, other=-float("inf"))
    z = _tempered(raw, temperature)
    at = row * chunks + chunk
    top = tl.maximum(tl.max(tl.max(z, 1), 0), LOWEST)
    below = z - top
    weights = tl.exp(below)
    if TRUNCATED:
        ruled_out = z - _top(tops_ptr, row, chunks, CHUNKS) < tl.load(least_ptr + row)
        weights = tl.where(ruled_out, 0.0, weights)
    sums = tl.sum(weights, 1)
    tl.store(sums_ptr + at * PER_CHUNK + block, sums)
    if not TRUNCATED:
        tl.store(tops_ptr + at, top)
        tl.store(totals_ptr + at, tl.sum(sums, 0))
        bends = weights * tl.where(weights > 0.0, below, 0.0)
        tl.store(bends_ptr + at, tl.sum(tl.sum(bends, 1), 0))


@triton.jit
def _entries(row_ptr, start, size, temperature, top, floor, BY_MASS: tl.constexpr, PIECE: tl.constexpr):
    """Return the order of a piece of a row as unsigned numbers, and the weights, 0 for entries below `floor`."""
    cols = start + tl.arange(0, PIECE)
    raw = tl.load(row_ptr + cols, mask=cols < size, other=-float("inf")).to(tl.float32)
    bits = tl.where(raw == 0.0, 0.0, raw).to(tl.uint32, bitcast=True)  # both zeros are one number
    order = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    weight = tl.full([PIECE], 1.0, tl.float32)
    if BY_MASS:
        weight = tl.exp(_tempered(raw, temperature) - top)
    return order, tl.where((cols < size) & (order >= floor), weight, 0.0)


@triton.jit
def _mass(row_ptr, size, temperature, top, floor, PIECE: tl.constexpr):
    total = tl.zeros([PIECE], tl.float32)
    for start in range(0, size, PIECE):
        _, weight = _entries(row_ptr, start, size, temperature, top, floor, True, PIECE)
        total += weight
    return tl.sum(total, 0)


@triton.jit
def _last(
    row_ptr, size, temperature, top, floor, goal, BY_MASS: tl.constexpr, LOW_BITS: tl.constexpr, PIECE: tl.constexpr
):
    """Return the greatest order at which the weights from there up reach `goal`, found from high bits to low."""
    found = tl.full([], 0, tl.uint32)
    step = tl.full([], 1 << 30, tl.uint32)
    for _ in range((33 - LOW_BITS) // 2):
        one = tl.zeros([PIECE], tl.float32)
        two = tl.zeros([PIECE], tl.float32)
        three = tl.zeros([PIECE], tl.float32)
        for start in range(0, size, PIECE):
            order, weight = _entries(row_ptr, start, size, temperature, top, floor, BY_MASS, PIECE)
            one += tl.where(order >= found + step, weight, 0.0)
            two += tl.where(order >= found + 2 * step, weight, 0.0)
            three += tl.where(order >= found + 3 * step, weight, 0.0)
        reached = (tl.sum(one, 0) >= goal).to(tl.uint32) + (tl.sum(two, 0) >= goal).to(tl.uint32)
        found += step * (reached + (tl.sum(three, 0) >= goal).to(tl.uint32))
        step = step >> 2
    return found


@triton.jit(do_not_specialize=["chunks", "top_k"])
def least_kernel(
    logits_ptr, tops_ptr, least_ptr, size, stride, chunks, temperature, top_k, top_p, log_min_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, LOW_BITS: tl.constexpr, CHUNKS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Compute the least z - top of a row that may be drawn. Grid (S)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    top = _top(tops_ptr, row, chunks, CHUNKS)
    floor = tl.full([], 0, tl.uint32)
    if TOP_K:
        goal = tl.minimum(top_k, size).to(tl.float32)
        floor = _last(row_ptr, size, temperature, top, floor, goal, False, LOW_BITS, PIECE)
    if TOP_P:
        goal = tl.maximum(top_p * _mass(row_ptr, size, temperature, top, floor, PIECE), 1e-30)  # one, if top_p is 0
        floor = _last(row_ptr, size, temperature, top, floor, goal, True, LOW_BITS, PIECE)
    least = log_min_p
    if TOP_K or TOP_P:
        bits = tl.where(floor >> 31 != 0, floor ^ 0x80000000, floor ^ 0xFFFFFFFF)
        last = ((bits >> LOW_BITS) << LOW_BITS).to(tl.float32, bitcast=True)
        least = tl.maximum(_tempered(last, temperature) - top, log_min_p)
    tl.store(least_ptr + row, least)


@triton.jit
def _reached(upto, weights, goal, count, COUNT: tl.constexpr):
    """Return the first index with a weight whose running sum reaches the goal; the last one where none does."""
    first = tl.min(tl.where((upto >= goal) & (weights > 0.0), count, COUNT), 0)
    return tl.where(first < COUNT, first, tl.max(tl.where(weights > 0.0, count, 0), 0))


@triton.jit(do_not_specialize=["chunks"])
def pick_kernel(
    logits_ptr, least_ptr, keys_ptr, positions_ptr, tops_ptr, totals_ptr, bends_ptr, sums_ptr,
    tokens_ptr, logprobs_ptr, entropies_ptr, size, stride, chunks, temperature,
    GREEDY: tl.constexpr, TRUNCATED: tl.constexpr, CHUNKS: tl.constexpr, PER_CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw a row's token and compute its log-prob and the entropy. Grid (S)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    chunk = tl.arange(0, CHUNKS)
    here = row * chunks + chunk
    tops = tl.load(tops_ptr + here, mask=chunk < chunks, other=LOWEST)
    totals = tl.load(totals_ptr + here, mask=chunk < chunks, other=0.0)
    bends = tl.load(bends_ptr + here, mask=chunk < chunks, other=0.0)
    top = tl.max(tops, 0)
    fade = tl.exp(tops - top)
    total = tl.sum(totals * fade, 0)
    bend = tl.sum(fade * (bends + totals * (tops - top)), 0)

    if GREEDY:
        best = tl.min(tl.where((tops == top) & (chunk < chunks), chunk, CHUNKS - 1), 0)
        cols = best * PER_CHUNK * BLOCK + tl.arange(0, PER_CHUNK * BLOCK)
        z = _tempered(tl.load(row_ptr + cols, mask=cols < size, other=-float("inf")), temperature)
        token = tl.min(tl.where(z == top, cols, size - 1), 0)
    else:
        number = tl.arange(0, CHUNKS * PER_CHUNK)
        known = number < chunks * PER_CHUNK
        sums = tl.load(sums_ptr + row * chunks * PER_CHUNK + number, mask=known, other=0.0)
        sums *= tl.exp(tl.load(tops_ptr + row * chunks + number // PER_CHUNK, mask=known, other=LOWEST) - top)
        sums = sums.to(tl.float64)
        upto = tl.cumsum(sums, 0)
        u = uniform(tl.load(keys_ptr + row), tl.load(positions_ptr + row))
        goal = u * tl.max(upto, 0)
        block = _reached(upto, sums, goal, number, CHUNKS * PER_CHUNK)
        before = tl.sum(tl.where(number < block, sums, 0.0), 0)
        rest = (goal - before) / tl.sum(tl.where(number == block, sums, 0.0), 0)  # how far into the block
        place = tl.arange(0, BLOCK)
        cols = block * BLOCK + place
        below = _tempered(tl.load(row_ptr + cols, mask=cols < size, other=-float("inf")), temperature) - top
        weights = tl.exp(below)
        if TRUNCATED:
            weights = tl.where(below < tl.load(least_ptr + row), 0.0, weights)
        weights = weights.to(tl.float64)
        inside = tl.cumsum(weights, 0)
        token = block * BLOCK + _reached(inside, weights, rest * tl.max(inside, 0), place, BLOCK)
        token = tl.minimum(token, size - 1)
    z = _tempered(tl.load(row_ptr + token), temperature)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, (z - top) - tl.log(total))
    tl.store(entropies_ptr + row, tl.log(total) - bend / total)


def sample(
    logits: Tensor, keys: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `sampling.sample`."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, size = logits.shape
    chunks = triton.cdiv(size, PER_CHUNK * BLOCK)
    numbers = [torch.empty(rows, chunks, device=logits.device) for _ in range(3)]  # tops, totals, bends
    sums = torch.empty(rows, chunks * PER_CHUNK, device=logits.device)
    least, logprobs, entropies = (torch.empty(rows, device=logits.device) for _ in range(3))
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    truncated = temperature != 0 and (top_k > 0 or top_p < 1.0 or min_p > 0.0)
    shape = (size, logits.stride(0), chunks, float(temperature or 1.0))
    wide = {"CHUNKS": triton.next_power_of_2(chunks)}
    blocks = {"PER_CHUNK": PER_CHUNK, "BLOCK": BLOCK}
    with torch.cuda.device_of(logits):
        sums_kernel[(rows * chunks,)](
            logits, least, *numbers, sums, *shape, TRUNCATED=False, **wide, **blocks, num_warps=8
        )
        if truncated:
            log_min_p = math.log(min_p) if min_p else -math.inf
            least_kernel[(rows,)](
                logits, numbers[0], least, *shape, top_k, float(top_p), log_min_p,
                TOP_K=top_k > 0, TOP_P=top_p < 1.0, LOW_BITS=LOW_BITS[logits.dtype], PIECE=PIECE, **wide, num_warps=8,
            )  # fmt: skip
            sums_kernel[(rows * chunks,)](
                logits, least, *numbers, sums, *shape, TRUNCATED=True, **wide, **blocks, num_warps=8
            )
        pick_kernel[(rows,)](
            logits, least, keys, positions, *numbers, sums, tokens, logprobs, entropies, *shape,
            GREEDY=temperature == 0, TRUNCATED=truncated, **wide, **blocks, num_warps=4,
        )  # fmt: skip
    return tokens, logprobs, entropies

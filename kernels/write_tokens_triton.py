"""The Triton kernel of `write_tokens.py`: a program copies one token's keys and values of one head."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def write_kernel(
    key_pages_ptr, value_pages_ptr, places_ptr, keys_ptr, values_ptr, key_token, key_head, value_token, value_head,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Copy row `token, head` of keys and values to its place."""
    token = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    place = tl.load(places_ptr + tl.program_id(0))
    d = tl.arange(0, BLOCK_D)
    key = tl.load(keys_ptr + token * key_token + head * key_head + d, mask=d < D, other=0.0)
    tl.store(key_pages_ptr + place * D + d, key, mask=d < D)
    dv = tl.arange(0, BLOCK_DV)
    value = tl.load(values_ptr + token * value_token + head * value_head + dv, mask=dv < DV, other=0.0)
    tl.store(value_pages_ptr + place * DV + dv, value, mask=dv < DV)


def write_tokens(key_pages: Tensor, value_pages: Tensor, places: Tensor, keys: Tensor, values: Tensor) -> None:
    """Compute `write_tokens.write_tokens`."""
    keys, values = (x if x.stride(2) == 1 else x.contiguous() for x in (keys, values))
    tokens, heads, width = keys.shape
    value_width = values.shape[2]
    with torch.cuda.device_of(keys):
        write_kernel[(tokens * heads,)](
            key_pages, value_pages, places, keys, values, *keys.stride()[:2], *values.stride()[:2],
            HEADS=heads, D=width, DV=value_width, BLOCK_D=triton.next_power_of_2(width),
            BLOCK_DV=triton.next_power_of_2(value_width), num_warps=1,
        )  # fmt: skip

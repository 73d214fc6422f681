"""Compute a decoding step's attention on a CPU in one call of compiled code (cpu/decode_attention.cpp).

It writes the new keys and values to their pages, attends to prompts and answers, and merges the two results.
kernels/decode_attention.py says what is computed.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gspo.kernels.native import call, cpu_kernels_take, is_bf16, size_array, tensor_array

LANES = 16


class Sequences(NamedTuple):
    """T sequences of keys, each with its pages and the slots that read it. All int32 on the CPU."""

    first_page: Tensor  # [T + 1]: sequence t has pages[first_page[t] : first_page[t + 1]], in order
    pages: Tensor
    sizes: Tensor  # [T], tokens
    first_slot: Tensor  # [T + 1], the same for the slots
    slots: Tensor
    hidden: Tensor  # [S], how many tokens at the start of its sequence a slot does not see

    @classmethod
    def of(
        cls, pages: np.ndarray, counts: np.ndarray, sizes: np.ndarray, which: np.ndarray, hidden: np.ndarray
    ) -> "Sequences":
        """Make them from `pages`, sequence by sequence, `counts` [T] of each; slot s reads sequence `which` [S]."""
        members = np.bincount(which, minlength=len(sizes))
        slots = which.argsort(kind="stable")
        arrays = _starts(counts), pages, sizes, _starts(members), slots, hidden
        return cls(*(torch.from_numpy(x.astype(np.int32)) for x in arrays))


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], counts.cumsum()])


class Pool(NamedTuple):
    """Pages and the sequences in them."""

    keys: Tensor  # [n, Hk, page, D]
    values: Tensor  # [n, Hk, page, Dv]
    sequences: Sequences


def decode_step(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    prompts: Pool,
    answers: Pool,
    page: Tensor,
    offset: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attend with q [S, H, D], key [S, Hk, D], value [S, Hk, Dv] of one new token a slot, and return [S, H, Dv].

    First key and value are written to `offset` [S] of the answers' pages `page` [S] (both int64). Every slot reads one
    sequence of each pool. Scores and sums are float32. For tensors that `native.cpu_kernels_take` accepts.
    """
    pages = (prompts.keys, prompts.values, answers.keys, answers.values)
    assert cpu_kernels_take(q, key, value, *pages) and all(x.is_contiguous() for x in pages)
    q, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, key, value))
    slots, heads, width = q.shape
    value_width = value.shape[2]
    padded = -(-value_width // LANES) * LANES
    scratch = torch.empty(2 * slots * heads * (padded + 1))
    out = q.new_empty(slots, heads, value_width)
    sequences = prompts.sequences, answers.sequences
    sizes = [slots, heads, key.shape[1], width, value_width, prompts.keys.shape[2], answers.keys.shape[2]]
    sizes += [len(x.sizes) for x in sequences]
    sizes += [stride for x in (q, key, value) for stride in x.stride()[:2]]
    call(
        "gspo_decode",
        bf16=is_bf16(q),
        tensors=tensor_array(*pages, q, key, value, *sequences[0], *sequences[1], page, offset, scratch, out),
        sizes=size_array(*sizes),
        scale=scale,
        softcap=softcap or 0.0,
    )
    return out

"""A step's attention in one call of compiled code (cpu/decode.cpp): new keys and values written, prompts and answers
read, their parts merged. kernels/decode.py says what is computed."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gspo.kernels.native import call, numbers, pointers, takes

LANES = 16


class Sequences(NamedTuple):
    """T sequences of keys, each with its pages and the slots that read it, all int32 on the CPU."""

    first_page: Tensor  # [T + 1]: sequence t has pages[first_page[t] : first_page[t + 1]], in order
    pages: Tensor
    sizes: Tensor  # [T], tokens
    first_slot: Tensor  # [T + 1], the same for the slots
    slots: Tensor
    hidden: Tensor  # [S], how many of the first tokens of its sequence a slot does not see

    @classmethod
    def of(
        cls, pages: np.ndarray, counts: np.ndarray, sizes: np.ndarray, which: np.ndarray, hidden: np.ndarray
    ) -> "Sequences":
        """`pages` sequence by sequence, `counts` [T] of each; `which` [S] is the sequence that a slot reads."""
        members = np.bincount(which, minlength=len(sizes))
        slots = which.argsort(kind="stable")
        arrays = _starts(counts), pages, sizes, _starts(members), slots, hidden
        return cls(*(torch.from_numpy(x.astype(np.int32)) for x in arrays))


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], counts.cumsum()])


class Pool(NamedTuple):
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
    """q [S, H, D], key [S, Hk, D], value [S, Hk, Dv] of a new token a slot -> [S, H, Dv].

    Key and value are put at `offset` [S] of the answers' pages `page` [S] (int64) first. Every slot reads one sequence
    of each pool. Scores and sums are float32. For tensors that `gspo.kernels.native.takes`.
    """
    pages = (prompts.keys, prompts.values, answers.keys, answers.values)
    assert takes(q, key, value, *pages) and all(x.is_contiguous() for x in pages)
    q, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, key, value))
    slots, heads, width = q.shape
    value_width = value.shape[2]
    padded = -(-value_width // LANES) * LANES
    scratch = torch.empty(2 * slots * heads * (padded + 1))
    out = q.new_empty(slots, heads, value_width)
    given = pointers(*pages, q, key, value, *prompts.sequences, *answers.sequences, page, offset, scratch, out)
    shape = [slots, heads, key.shape[1], width, value_width, prompts.keys.shape[2], answers.keys.shape[2]]
    shape += [len(prompts.sequences.sizes), len(answers.sequences.sizes)]
    shape += [stride for x in (q, key, value) for stride in x.stride()[:2]]
    call("gspo_decode", int(q.dtype == torch.bfloat16), given, numbers(shape), scale, softcap or 0.0)
    return out

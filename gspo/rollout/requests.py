"""Define what an engine is given (`Requests`), what it returns (`Results`), and what it must do (`Engine`).

Shapes: G prompts, n responses to each, R = G * n rows; row g * n + i is response i to prompt g. L is the longest
response allowed, `sampling.max_new_tokens`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.stop_strings import StopStrings


@dataclass(frozen=True, eq=False)
class Requests:
    """n responses to sample to each of G prompts."""

    prompts: list[tuple[int, ...]]  # G, token ids
    n: int
    sampling: Sampling
    keys: Tensor  # [R] int64: the key of each row's random numbers (draw_tokens.py)
    limits: Tensor  # [R] int64, 1..L: tokens that each response may have
    end_ids: Tensor  # [E] int64: tokens that end a response
    pad_id: int  # fills `Results.tokens` behind a response
    stop: StopStrings | None  # texts that end a response


@dataclass(frozen=True, eq=False)
class Results:
    """The responses sampled so far; a row is final once its prompt was yielded by `Generation.run`."""

    tokens: Tensor  # [R, L] int64, padded on the right with `pad_id`
    lengths: Tensor  # [R] int64, tokens of the response, the one that ended it included
    logprobs: Tensor  # [R, L] float32, at the sampling temperature; 0 in the padding
    entropy: Tensor  # [R, L] float32, nats, of softmax(logits / T) before top-k, top-p, min-p; 0 in the padding
    finished: Tensor  # [R] bool, ended by an end token or a stop string, not by its limit


@dataclass
class EngineOptions:
    """What an engine may use. None of it changes a response."""

    max_slots: int | Literal["auto"] = 256  # responses generated at the same time, at most
    kv_memory_gib: float | Literal["auto"] = "auto"  # of keys and values; auto: half of the free memory
    page: int | None = None  # tokens of a page of the KV cache; None: chosen by the longest response
    agree: Callable[[Tensor], Tensor] | None = None  # ranks of a tensor-parallel model agree on every token drawn


class Generation(Protocol):
    """One batch of requests under way."""

    def run(self, tick: Callable[[], None]) -> Iterator[int]:
        """Sample everything; yield the number g of each prompt as soon as its last response has ended, so that it can
        be scored while others go on. Call `tick` every few tokens: it redraws the progress line."""

    def progress(self) -> tuple[int, int]:
        """Return (responses that have ended, tokens sampled so far)."""

    def results(self) -> Results:
        """Return the results as they stand, without a copy."""


class Engine(Protocol):
    """Sample with one model. An engine is made once and started once a rollout; the weights may change in between.

    Its responses must be those of the model by itself: log-probs are taken before top-k, top-p and min-p, and every
    token is drawn by the uniform that belongs to its row's key and its position (`sampling.draw`), so that no response
    depends on the others of its batch.
    """

    def __init__(self, model: nn.Module, device: torch.device, options: EngineOptions):
        """Raise UserError where this engine would give the model other log-probs than its own."""

    def start(self, requests: Requests) -> Generation:
        """Allocate what these requests need. Raise UserError where it does not fit into memory."""

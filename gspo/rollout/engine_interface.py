"""Define what an engine is given (`Requests`), what it returns (`Results`), and what it must do (`Engine`).

Shapes: G prompts, R rows: one a response, those to one prompt side by side, in the prompts' order. L is the longest
response allowed, `sampling.max_new_tokens`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.kept_keys import KeptKeys
from gspo.rollout.stop_strings import StopStrings


@dataclass(frozen=True, eq=False)
class Requests:
    """Responses to sample to each of G prompts.

    A prompt may end in tokens that its responses begin with, drawn earlier (branches of a trunk): its last max(begun)
    tokens, of which each response has the first `begun`, and sees no further ones. They stand in the results, count as
    tokens of the response, and the next token drawn has position `begun`. What was `kept` of their trunks spares an
    engine that computation; it may as well ignore it.
    """

    prompts: list[tuple[int, ...]]  # G, token ids
    counts: list[int]  # G, responses to each
    begun: list[int]  # R
    sampling: Sampling
    keys: Tensor  # [R] int64: the key of each row's random numbers (draw_tokens.py)
    limits: Tensor  # [R] int64, 1..L: tokens that each response may have
    end_ids: Tensor  # [E] int64: tokens that end a response
    pad_id: int  # fills `Results.tokens` behind a response
    stop: StopStrings | None  # texts that end a response
    kept: KeptKeys | None = None  # of a tree: where an engine may keep keys and values of trunks for their branches
    trunks: tuple[int, ...] = ()  # G: whose prompt and beginning each prompt is, as a row of `kept`; (): no branches

    def rows(self, g: int) -> range:
        """Return the rows of the responses to prompt g."""
        return range(self._ends[g] - self.counts[g], self._ends[g])

    def seen(self, g: int) -> list[int]:
        """Return how many tokens of prompt g each of its responses sees."""
        begun = [self.begun[row] for row in self.rows(g)]
        return [len(self.prompts[g]) - max(begun) + b for b in begun]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.counts))


@dataclass(frozen=True, eq=False)
class Results:
    """The responses sampled so far; a row is final once its prompt was yielded by `Generation.run`."""

    tokens: Tensor  # [R, L] int64, padded on the right with `pad_id`
    lengths: Tensor  # [R] int64, tokens of the response, the one that ended it included
    logprobs: Tensor  # [R, L] float32, at the sampling temperature; 0 in the padding
    entropy: Tensor  # [R, L] float32, nats, of softmax(logits / T) before top-k, top-p, min-p; 0 in the padding
    finished: Tensor  # [R] bool, ended by an end token or a stop string, not by its limit

    @classmethod
    def begin(cls, requests: Requests, device: torch.device, spare: int = 0) -> "Results":
        """Return the results before anything is drawn: the tokens that responses have begun with, and zeros. `spare`
        further rows belong to no response."""
        rows, longest = len(requests.keys) + spare, requests.sampling.max_new_tokens
        tokens = torch.full((rows, longest), requests.pad_id)
        lengths = torch.zeros(rows, dtype=torch.long)
        for g, prompt in enumerate(requests.prompts):
            for row, seen in zip(requests.rows(g), requests.seen(g), strict=True):
                if begun := requests.begun[row]:
                    lengths[row], tokens[row, :begun] = begun, torch.tensor(prompt[seen - begun : seen])
        numbers = torch.zeros(rows, longest, device=device)
        finished = torch.zeros(rows, dtype=torch.bool, device=device)
        return cls(tokens.to(device), lengths.to(device), numbers, numbers.clone(), finished)

    def put(self, rows: Tensor, other: "Results", which: slice) -> None:
        """Copy rows `which` of other results to `rows` of these; log-probs and entropies of the tokens that were drawn,
        not of those that a response had begun with."""
        drawn = torch.arange(self.tokens.shape[1], device=rows.device) >= self.lengths[rows, None]
        self.logprobs[rows] = torch.where(drawn, other.logprobs[which], self.logprobs[rows])
        self.entropy[rows] = torch.where(drawn, other.entropy[which], self.entropy[rows])
        self.tokens[rows], self.lengths[rows] = other.tokens[which], other.lengths[which]
        self.finished[rows] = other.finished[which]


@dataclass
class EngineOptions:
    """What an engine may use. None of it changes a response."""

    max_slots: int | Literal["auto"] = "auto"  # responses generated at the same time, at most
    kv_memory_gib: float | Literal["auto"] = "auto"  # of keys and values; auto: half of the free memory
    page: int | None = None  # tokens of a page of the KV cache; None: chosen by the longest response
    agree: Callable[[Tensor], Tensor] | None = None  # ranks of a tensor-parallel model agree on every token drawn


class Generation(Protocol):
    """One batch of requests under way."""

    def run(self, tick: Callable[[], None]) -> Iterator[int]:
        """Sample everything; yield the number g of each prompt as soon as its last response has ended, so that it can
        be scored while others go on. Call `tick` every few tokens: it redraws the progress line."""

    def progress(self) -> tuple[int, int]:
        """Return (responses that have ended, tokens sampled so far, those they had begun with left out)."""

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

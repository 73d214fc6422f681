"""Random numbers and the choice of a token: pure functions.

Randomness is stateless: the uniform behind a token depends on (seed, purpose, step, prompt, sample, position) and on
nothing else, so a response does not change with its batch mates, with the order of work or with the number of ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gspo import config

_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 64

    @classmethod
    def of(cls, cfg: config.Rollout) -> "Sampling":
        return cls(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.max_new_tokens)

    def greedy(self) -> "Sampling":
        return Sampling(temperature=0.0, max_new_tokens=self.max_new_tokens)


def _mix(x: Tensor) -> Tensor:
    """lowbias32, a 32-bit integer hash (nullprogram.com/blog/2018/07/31), on int64 tensors holding 32-bit values."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def fold(state: Tensor, value: Tensor | int) -> Tensor:
    """Absorb a non-negative integer into a 32-bit hash state."""
    value = torch.as_tensor(value, dtype=torch.int64, device=state.device)
    return _mix((state * 0x9E3779B1 + _mix(value & _MASK32) + 0x85EBCA6B) & _MASK32)


def sample_keys(seed: int, purpose: int, step: int, prompt_ids: Tensor, sample_index: Tensor) -> Tensor:
    """One 32-bit key a sequence: [R] int64 from prompt ids [R] and sample indices [R]."""
    key = torch.zeros_like(prompt_ids)
    for value in (seed, purpose, step, prompt_ids, sample_index):
        key = fold(key, value)
    return key


def uniforms(keys: Tensor, position: int) -> Tensor:
    """[R] float64, uniform on (0, 1), for token `position` of the sequences with these keys."""
    high, low = fold(keys, 2 * position), fold(keys, 2 * position + 1)
    return (((high << 21) ^ low).double() + 0.5) / 2.0**53


def truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Apply top_k, top_p and min_p to temperature-scaled logits [R, V]: what is ruled out becomes -inf."""
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, before >= sampling.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if sampling.min_p:
        top = logits.amax(-1, keepdim=True)
        logits = logits.masked_fill(logits < top + torch.log(torch.tensor(sampling.min_p)), -torch.inf)
    return logits


def choose(logits: Tensor, u: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token a row by inverse CDF.

    logits [R, V] of any dtype, u [R] uniforms (None when greedy) -> tokens [R], their log-probabilities [R] float32
    under softmax(logits / T) *before* truncation (what the trainer sees), and the entropy [R] of that distribution.
    """
    logits = logits.float()
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    logprobs = logits.log_softmax(-1)
    entropy = torch.special.entr(logprobs.exp()).sum(-1)  # 0 where a logit is -inf
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        probs = truncate(logits, sampling).softmax(-1)
        cdf = probs.cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None]).squeeze(-1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1), entropy

"""Draw tokens from logits, with random numbers that belong to the token: pure functions.

Randomness is stateless: the uniform behind a token depends on (seed, purpose, step, prompt, sample, position) and on
nothing else, so a response does not change with its batch mates, with the order of work or with the number of ranks.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo import config
from gspo.errors import UserError
from gspo.kernels.draw_token import sample

_MASK32 = 0xFFFFFFFF
BLOCK = 256  # vocabulary entries summed in float32; blocks are added up in float64
NUCLEUS = 256  # likeliest tokens sorted at first for top_p; more only if needed
CPU_ENTRIES = 2**20  # logits worked on at a time: 4 MiB stay in a CPU's cache from pass to pass
LN2 = math.log(2)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; `temperature` 0 is greedy. Raises UserError for values out of range."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()  # a response ends with the token that completes one of these, and keeps it

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("temperature", 0 <= self.temperature < math.inf, "0, for the likeliest token, or more"),
            ("top_k", self.top_k >= 0, "0, for all tokens, or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "0 or more and below 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
        ):
            if not fits:
                raise UserError(f"{name} = {getattr(self, name)}: it must be {wanted}.")

    @classmethod
    def of(cls, cfg: config.Rollout) -> "Sampling":
        return cls(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.max_new_tokens, tuple(cfg.stop))

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0

    def greedy(self) -> "Sampling":
        return Sampling(temperature=0.0, max_new_tokens=self.max_new_tokens, stop=self.stop)


def _mix(x: Tensor) -> Tensor:
    """Hash 32-bit values, held in int64 tensors, by lowbias32 (nullprogram.com/blog/2018/07/31)."""
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
    """Return one 32-bit key a response: [R] int64, from prompt ids [R] and sample indices [R]."""
    key = torch.zeros_like(prompt_ids)
    for value in (seed, purpose, step, prompt_ids, sample_index):
        key = fold(key, value)
    return key


def uniforms(keys: Tensor, position: Tensor | int) -> Tensor:
    """Return [R] float64, uniform on (0, 1), for token `position` ([R], or one for all) of the responses of `keys`."""
    high, low = fold(keys, 2 * position), fold(keys, 2 * position + 1)
    return (((high << 21) ^ low).double() + 0.5) / 2.0**53


def threshold(logits: Tensor, sampling: Sampling) -> Tensor | None:
    """Return the smallest temperature-scaled logit of [R, V] that top_k, top_p and min_p, in this order, keep: [R, 1].

    Tokens as likely as the last one kept are kept, too, so that the draw does not depend on how ties are sorted. None
    where all tokens are kept.
    """
    least = None
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
    if sampling.top_p < 1.0:
        least = _nucleus(logits, least, sampling.top_p)
    if sampling.min_p:
        close = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        least = close if least is None else torch.maximum(least, close)
    return least


def _nucleus(logits: Tensor, least: Tensor | None, top_p: float) -> Tensor:
    """Return the smallest logit of the nucleus [R, 1]: the likeliest tokens until their probabilities reach `top_p`.

    Logits below `least` [R, 1] do not count. Only the likeliest `count` tokens are sorted, more of them until they hold
    the nucleus.
    """
    kept = logits if least is None else logits.masked_fill(logits < least, -torch.inf)
    total, count = kept.logsumexp(-1, keepdim=True), NUCLEUS
    while True:
        count = min(count, logits.shape[-1])
        best = kept.topk(count).values
        share = (best - total).exp()
        before = share.cumsum(-1) - share
        if count == logits.shape[-1] or bool((before[:, -1] >= top_p).all()):
            last = (before < top_p).sum(-1, keepdim=True) - 1
            return best.gather(-1, last.clamp_min(0))
        count *= 8


def draw(logits: Tensor, keys: Tensor, position: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Draw as `choose` does from logits [R, V], with the uniforms of the responses of `keys` [R] at `position` [R].

    By a kernel that takes these logits (kernels/draw_token.py), on CUDA without waiting for the device, or by `choose`.
    """
    s = sampling
    drawn = sample(logits, keys, position, s.temperature, s.top_k, s.top_p, s.min_p)
    if drawn is not None:
        return drawn
    return choose(logits, None if s.temperature == 0 else uniforms(keys, position), s)


def choose(logits: Tensor, u: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token a row by inverse CDF.

    logits [R, V] of any dtype, u [R] uniforms (None when greedy) -> tokens [R], their log-probabilities [R] float32
    under softmax(logits / T) *before* truncation (what the trainer sees), and the entropy [R] of that distribution.
    On the CPU a few rows at a time, so that their passes find them in the cache.
    """
    rows = max(1, CPU_ENTRIES // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    uniform = [None] * len(logits) if u is None else u.split(rows)
    parts = [_choose(part, v, sampling) for part, v in zip(logits.split(rows), uniform, strict=False)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _choose(logits: Tensor, u: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Choose in base 2: on CPUs exp2 takes a third of exp's time."""
    below = logits.float() * (1 / (LN2 * (sampling.temperature or 1.0)))
    below.sub_(below.amax(-1, keepdim=True))
    weights = below.exp2()
    total = weights.sum(-1)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        kept = weights
        if sampling.truncates:
            scaled = below * LN2
            kept = weights.masked_fill(scaled < threshold(scaled, sampling), 0.0)
        tokens = invert(kept, u)
    size = total.log2()
    logprobs = (below.gather(-1, tokens[:, None]).squeeze(-1) - size) * LN2
    sums = weights.mul_(below).sum(-1)
    if sums.isnan().any():  # 0 times minus infinity, where a logit is that
        sums = weights.nan_to_num_().sum(-1)
    return tokens, logprobs, (size - sums / total) * LN2


def invert(weights: Tensor, u: Tensor) -> Tensor:
    """Return the first token at which the running sum of weights [R, V] reaches the share u [R] of the whole: [R].

    Two levels: float32 sums of blocks, added up in float64, choose the block; float64 sums inside it choose the token.
    What is drawn follows the weights as exactly as float32 holds them, and only V / BLOCK + BLOCK entries a row are
    summed in float64. A token of weight 0 is never drawn.
    """
    size = weights.shape[-1]
    length = min(BLOCK, size)
    whole = size // length * length
    blocks = weights[:, :whole].unflatten(-1, (-1, length)).sum(-1)
    if whole < size:
        blocks = torch.cat([blocks, weights[:, whole:].sum(-1, keepdim=True)], -1)
    upto = blocks.cumsum(-1, dtype=torch.float64)
    goal = (u * upto[:, -1])[:, None]
    block = torch.searchsorted(upto, goal)
    place = block * length + torch.arange(length, device=weights.device)
    inside = weights.gather(-1, place.clamp_max(size - 1)).masked_fill(place >= size, 0.0)
    inside = inside.cumsum(-1, dtype=torch.float64)
    share = blocks.gather(-1, block).double()
    rest = (goal - upto.gather(-1, block) + share) / share  # how far into the block, as a share of it
    within = torch.searchsorted(inside, rest.clamp(1e-300, 1.0) * inside[:, -1:])
    return (block * length + within).squeeze(-1)

"""Draws of a token, shared by the tests of all that draws: where one differs from gspo/rollout/draw_tokens.py's."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gspo.kernels.draw_token import sample
from gspo.rollout.draw_tokens import Sampling, choose, sample_keys, threshold, uniforms

NEAR = 1e-5  # of the distribution: how far a draw may lie beside a token that the other order of sums chose


class Case(NamedTuple):
    rows: int
    size: int
    dtype: torch.dtype
    sampling: Sampling
    kind: str = "normal"

    def name(self) -> str:
        said = {k: v for k, v in vars(self.sampling).items() if k in ("temperature", "top_k", "top_p", "min_p")}
        return f"{self.rows}x{self.size} {str(self.dtype)[6:]} {self.kind} {said}"


def logits_of(case: Case, seed: int = 0) -> Tensor:
    """`normal`: a spread of three; `peaked`: of ten; `flat`: all the same; `holes`: whole chunks impossible; `ties`."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(case.rows, case.size + 3, generator=g)[:, : case.size] * {"peaked": 10.0}.get(case.kind, 3.0)
    if case.kind == "flat":
        x = torch.zeros_like(x)
    if case.kind == "ties":
        x = x.round()
    if case.kind == "holes":
        x[:, torch.rand(case.size, generator=g) < 0.5] = -torch.inf
        x[:, : case.size // 3] = -torch.inf
        x[:, -5:] = -torch.inf
    return x.to(case.dtype)


def keys_of(rows: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    number = torch.arange(rows, device=device)
    return sample_keys(5, 1, 2, number // 8, number % 8), number * 37 % 1000


def differences(case: Case, device: str = "cpu", seed: int = 0, sample: Callable = sample) -> list[str]:
    """What is not as `choose` has it, in words. Another token may be drawn only where u lies at an edge between the two
    (in float64, within NEAR), or where float32 sums cannot tell what top_p keeps."""
    logits, (keys, positions) = logits_of(case, seed).to(device), keys_of(case.rows, device)
    s = case.sampling
    tokens, logprobs, entropy = sample(logits, keys, positions, s.temperature, s.top_k, s.top_p, s.min_p)
    u = uniforms(keys, positions) if s.temperature else None
    expected, _, expected_entropy = choose(logits, u, s)
    z = logits.double() / (s.temperature or 1.0)
    true = z.log_softmax(-1)
    wrong = []
    for row in (tokens != expected).nonzero().flatten().tolist():
        if not s.temperature or not _at_an_edge(logits[row], u[row], s, int(tokens[row]), int(expected[row])):
            wrong.append(f"{case.name()}, row {row}: token {int(tokens[row])}, not {int(expected[row])}")
    # float32 knows a logit of z to about 6e-8 z
    error = (logprobs - true.gather(1, tokens[:, None])[:, 0]).abs() / (1 + z.amax(-1).abs())
    if not error.max() <= 4e-6:
        wrong.append(f"{case.name()}: log-prob off by {float(error.max()):.1e}")
    if not (entropy - expected_entropy).abs().max() <= 1e-5 * (1 + math.log(case.size)):
        wrong.append(f"{case.name()}: entropy off by {float((entropy - expected_entropy).abs().max()):.1e}")
    return wrong


def _at_an_edge(logits: Tensor, u: Tensor, sampling: Sampling, token: int, expected: int) -> bool:
    below = logits.float() / sampling.temperature
    below = below - below.amax()
    least = threshold(below[None], sampling)
    weights = below.double().exp()
    if least is not None:
        weights[below < least[0]] = 0.0
    upto = weights.cumsum(0) / weights.sum()
    return bool(weights[token] > 0) and all(
        bool(u >= upto[t] - weights[t] / weights.sum() - NEAR) and bool(u <= upto[t] + NEAR) for t in (token, expected)
    )


def cases() -> list[Case]:
    plain = Sampling(0.9)
    found = [Case(3, size, torch.float32, plain) for size in (1, 7, 256, 257, 3000)]
    found += [Case(3, 2001, torch.float32, plain, kind) for kind in ("peaked", "flat", "ties", "holes")]
    found += [Case(3, 2001, dtype, Sampling(1.3), "holes") for dtype in (torch.bfloat16, torch.float16)]
    found += [Case(3, 2001, torch.bfloat16, Sampling(0.0), kind) for kind in ("normal", "ties", "holes")]
    cuts = [
        Sampling(0.7, min_p=0.02),
        Sampling(1.0, top_k=50),
        Sampling(1.0, top_p=0.9),
        Sampling(0.8, top_k=40, top_p=0.95, min_p=0.05),
        Sampling(2.0, top_k=10**6, top_p=0.999),
    ]
    found += [Case(2, 1101, torch.bfloat16, s, "ties") for s in cuts]
    found += [Case(2, 1101, torch.float32, s) for s in cuts[3:]]
    found += [
        Case(10, 40, torch.float32, Sampling(3.0, top_k=2)),
        Case(10, 40, torch.bfloat16, Sampling(3.0, top_p=0.3)),
    ]
    return [*found, Case(3, 1024, torch.float16, cuts[3]), Case(3, 700, torch.bfloat16, cuts[2], "holes")]


def observed(
    size: int, sampling: Sampling, count: int, device: str = "cpu", sample: Callable = sample
) -> tuple[Tensor, Tensor]:
    """How often `count` draws from one row came to each token, and how often softmax would have them."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device) * 2
    number = torch.arange(count, device=device)
    keys = sample_keys(3, 0, 0, number // 8, number % 8)
    s = sampling
    tokens, _, _ = sample(
        logits.expand(count, -1), keys, torch.zeros_like(keys), s.temperature, s.top_k, s.top_p, s.min_p
    )
    below = logits / s.temperature
    below = below - below.amax()
    least = threshold(below[None], s)
    kept = torch.ones_like(below, dtype=torch.bool) if least is None else below >= least[0]
    p = below.double().exp().masked_fill(~kept, 0.0)
    return torch.bincount(tokens, minlength=size), count * p / p.sum()

"""Cases of the linear log-prob, shared by the CPU's tests, the interpreter's and the GPU's, and how far off one is.

A result's error is its distance to float64 autograd. It may be four times plain PyTorch's own in the same dtype, plus a
few units in the last place: kernels and processors round in other places, but not with fewer digits.
"""

import itertools
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from gspo.kernels.ops import linear_logprob, linear_logprob_and_grad, reference_linear_logprob

MARGIN = 4  # between two right ways to round, in any draw and on any processor
SLACK = {torch.float64: 4e-15, torch.float32: 3e-7, torch.bfloat16: 2e-3}

HEADS = [
    {},
    {"temperature": 0.7},
    {"scale": 0.25},
    {"softcap": 4.0, "temperature": 1.3},
    {"softcap": 4.0, "scale": 1.7},
    {"temperature": 0.9, "bias": True},
]


class Case(NamedTuple):
    tokens: int
    size: int
    vocabulary: int
    dtype: torch.dtype
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    bias: bool = False
    autocast: bool = False  # bfloat16 products of float32 tensors
    keep: int | None = None

    def head(self) -> dict:
        return {k: getattr(self, k) for k in ("scale", "softcap", "temperature")}

    def name(self) -> str:
        parts = [f"{self.tokens}x{self.size}x{self.vocabulary}", str(self.dtype)[6:]]
        numbers = {k: getattr(self, k) for k in ("scale", "softcap", "temperature", "keep")}
        parts += [f"{k} {v}" for k, v in numbers.items() if v not in (1.0, None)]
        return ", ".join(parts + [k for k in ("bias", "autocast") if getattr(self, k)])


def draw(case: Case, device: str = "cpu", seed: int = 0) -> dict[str, Tensor | None]:
    """Draw inputs whose logits have a spread of about three, and the gradient of the log-probs."""
    g = torch.Generator().manual_seed(seed)
    t, d, v = case[:3]
    drawn = {
        "hidden": torch.randn(t, d, generator=g),
        "weight": torch.randn(v, d, generator=g) * 3 / d**0.5,
        "bias": torch.randn(v, generator=g) if case.bias else None,
        "slope": torch.randn(t, generator=g),
    }
    for k in ("hidden", "weight", "bias"):
        drawn[k] = None if drawn[k] is None else drawn[k].to(case.dtype)
    drawn["targets"] = torch.randint(v, (t, 2), generator=g)[:, 0]  # not contiguous
    drawn["targets"][:2] = torch.tensor([0, v - 1])[:t]  # both ends of the vocabulary
    return {k: None if x is None else x.to(device) for k, x in drawn.items()}


def outcome(function, case: Case, inputs: dict, dtype: torch.dtype, **more) -> dict[str, Tensor]:
    """Return the log-probs and the gradients of sum slope * logprob, with the inputs in `dtype`."""
    leaves = {
        k: inputs[k].to(dtype, copy=True).requires_grad_()
        for k in ("hidden", "weight", "bias")
        if inputs[k] is not None
    }
    at_half = case.autocast and dtype != torch.float64
    with torch.autocast(inputs["hidden"].device.type, torch.bfloat16) if at_half else nullcontext():
        logprob = function(
            leaves["hidden"], leaves["weight"], inputs["targets"], bias=leaves.get("bias"), **case.head(), **more
        )
    (logprob * inputs["slope"]).sum().backward()
    return {"logprob": logprob.detach()} | {k: x.grad for k, x in leaves.items()}


def outcome_known(case: Case, inputs: dict) -> dict[str, Tensor]:
    """Return the same of linear_logprob_and_grad, from a loss of twice the surrogate."""
    leaves = {k: inputs[k].clone().requires_grad_() for k in ("hidden", "weight", "bias") if inputs[k] is not None}
    with torch.autocast(inputs["hidden"].device.type, torch.bfloat16) if case.autocast else nullcontext():
        surrogate, logprob = linear_logprob_and_grad(
            leaves["hidden"], leaves["weight"], inputs["targets"], lambda logprob, rows: inputs["slope"][rows],
            bias=leaves.get("bias"), **case.head(), keep=case.keep,
        )  # fmt: skip
    torch.testing.assert_close(surrogate, (inputs["slope"] * logprob).sum(), rtol=1e-4, atol=1e-4)
    (2.0 * surrogate).backward()
    return {"logprob": logprob} | {k: x.grad / 2.0 for k, x in leaves.items()}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


def too_far(case: Case, device: str = "cpu", known: bool = False) -> list[str]:
    """What is further from float64 than plain PyTorch is, in words; nothing if all is well.

    The root mean square over several draws where a draw is only a few tokens.
    """
    errors, allowances, wrong = {}, {}, []
    draws = 1 + 12 // case.tokens
    for seed in range(draws):
        inputs = draw(case, device, seed)
        exact = outcome(reference_linear_logprob, case, inputs, torch.float64)
        plain = outcome(reference_linear_logprob, case, inputs, case.dtype)
        ours = (
            outcome_known(case, inputs) if known else outcome(linear_logprob, case, inputs, case.dtype, keep=case.keep)
        )
        assert {k: x.dtype for k, x in ours.items()} == {k: x.dtype for k, x in plain.items()}
        for key, true in exact.items():
            errors[key] = errors.get(key, 0.0) + distance(ours[key], true) ** 2 / draws
            allowances[key] = allowances.get(key, 0.0) + distance(plain[key], true) ** 2 / draws
    for key, error in errors.items():
        allowed = MARGIN * allowances[key] ** 0.5 + SLACK[torch.bfloat16 if case.autocast else case.dtype]
        if not error**0.5 <= allowed:
            wrong.append(f"{case.name()} {key}: {error**0.5:.2e} > {allowed:.2e}")
    return wrong


def cases(dtypes=(torch.float64, torch.float32, torch.bfloat16)) -> list[Case]:
    """Every dtype with every option, over odd shapes: one token, no token, one entry more or less than an alignment."""
    shapes = [(1, 8, 1000), (40, 24, 333), (37, 64, 257), (65, 16, 128), (3, 32, 127), (130, 8, 97)]
    keeps = itertools.cycle([None, 0, 40_000])
    every = [Case(*shape, dtype, **head, keep=next(keeps)) for dtype in dtypes for shape in shapes for head in HEADS]
    return every + [Case(40, 24, 333, torch.float32, **head, autocast=True) for head in HEADS]

"""Compute attention inside segments of consecutive tokens, with its log-sum-exp and a separate backward.

Queries [T, H, D] and keys and values [S, Hk, D] are cut into equally many segments; a segment's queries see only its
keys. Every backend has the same two functions. With scores s, p = exp(s - lse) and delta = rowsum(dout * out):

    dv = p^T dout        ds = p * (dout v^T - delta)        dq = scale * ds k        dk = scale * ds^T q

`backward` takes out and lse from its caller: if they belong to a softmax over more keys than these segments hold, it
returns these keys' share of that softmax's gradients.
"""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gspo.kernels.dispatch import Implementation, choose


@dataclass(frozen=True, eq=False)
class Segments:
    """Which queries see which keys: those of the same segment, both aligned at the segment's end."""

    queries: Tensor  # [segments + 1] int32, each segment's first query, and the end
    keys: Tensor  # [segments + 1] int32
    longest_query: int  # or more
    longest_key: int  # or more
    causal: bool = False
    window: int | None = None  # with causal: keys that a query sees, its own included

    @staticmethod
    def of(
        queries: Tensor,
        keys: Tensor,
        causal: bool = False,
        window: int | None = None,
        device: str | torch.device = "cpu",
    ) -> "Segments":
        """Make them from the segments' lengths [segments] on the CPU, in queries and in keys; none may be empty."""
        assert len(queries) == len(keys) > 0 and int(queries.min()) > 0 and int(keys.min()) > 0
        offsets = (torch.nn.functional.pad(x.cumsum(0), (1, 0)).to(device, torch.int32) for x in (queries, keys))
        return Segments(*offsets, int(queries.max()), int(keys.max()), causal, window)

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Yield each segment's queries and keys."""
        q, k = self.queries.tolist(), self.keys.tolist()
        for i in range(len(q) - 1):
            yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


class Rule(NamedTuple):
    """Scores are scale * q k^T, then softcap * tanh(scores / softcap) where there is a softcap."""

    segments: Segments
    scale: float
    softcap: float | None = None


Gradients = tuple[Tensor, Tensor, Tensor]  # of queries, keys and values


class Backend(Protocol):
    """One implementation of forward and backward."""

    softcaps: bool  # whether a rule may have a softcap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        """Return out [T, H, D] and lse [H, T] for q [T, H, D], k, v [S, Hk, D]."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> Gradients:
        """Return the gradients for grad, q, out [T, H, D], k, v [S, Hk, D], lse [H, T], all contiguous."""


class Plain:
    """The formulas in plain PyTorch, segment by segment, in the inputs' dtype: the reference of the other backends."""

    softcaps = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        out = q.new_empty(*q.shape[:2], v.shape[2])
        lse = q.new_empty(q.shape[1], q.shape[0])
        for i, j in rule.segments.slices():
            scores, hidden, _, values = self._scores(q[i], k[j], v[j], rule)
            scores = scores.masked_fill(hidden, -torch.inf)
            lse[:, i] = scores.logsumexp(-1)
            out[i] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> Gradients:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        delta = (grad * out).sum(-1).T
        for i, j in rule.segments.slices():
            scores, hidden, keys, values = self._scores(q[i], k[j], v[j], rule)
            p = (scores - lse[:, i, None]).exp().masked_fill(hidden, 0.0)
            ds = p * (torch.einsum("qhd,khd->hqk", grad[i], values) - delta[:, i, None])
            if rule.softcap is not None:
                ds = ds * (1 - (scores / rule.softcap).square())
            dq[i] = rule.scale * torch.einsum("hqk,khd->qhd", ds, keys)
            dk[j] = rule.scale * torch.einsum("hqk,qhd->khd", ds, q[i]).unflatten(1, (k.shape[1], -1)).sum(2)
            dv[j] = torch.einsum("hqk,qhd->khd", p, grad[i]).unflatten(1, (v.shape[1], -1)).sum(2)
        return dq, dk, dv

    @staticmethod
    def _scores(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a segment's scores [H, Q, K], which are hidden [Q, K], and keys and values repeated to H heads."""
        segments, scale, softcap = rule
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        key = torch.arange(len(k), device=q.device)
        own = key[len(k) - len(q) :, None] if segments.causal else key[-1:, None].expand(len(q), 1)
        seen = key <= own
        if segments.window is not None:
            seen = seen & (key > own - segments.window)
        return scores, ~seen, k, v


def _longest(segments: Segments) -> tuple[int, int]:
    """Return the longest query and key for FlashAttention, at least 2.

    With 1 query it would take its decoding path, which swaps heads and queries and has failed on ragged segments
    (flash-attention, issue 1619).
    """
    return max(2, segments.longest_query), max(2, segments.longest_key)


def _window(segments: Segments) -> tuple[int, int]:
    """Return how many keys are seen to the left and to the right of a query's own; -1: all."""
    return (-1, -1) if segments.window is None else (segments.window - 1, 0)


class TorchFlash:
    """PyTorch's own FlashAttention, by the operators under torch.nn.attention.varlen."""

    softcaps = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *self._shape(rule.segments), return_debug_mask=False, **self._options(rule)
        )
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> Gradients:
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, *self._shape(rule.segments), *no_dropout, **self._options(rule)
        )

    @staticmethod
    def _shape(segments: Segments) -> tuple[Tensor | int | float | bool, ...]:
        return segments.queries, segments.keys, *_longest(segments), 0.0, segments.causal

    @staticmethod
    def _options(rule: Rule) -> dict[str, float]:
        left, right = _window(rule.segments)
        return {"scale": rule.scale, "window_size_left": left, "window_size_right": right}


class FlashAttention:
    """The flash_attn package, 2.7 or later, by the functions under its flash_attn_varlen_func."""

    softcaps = True

    def __init__(self) -> None:
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        self._forward, self._backward = interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._forward(q, k, v, **self._options(rule))
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> Gradients:
        written = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        deterministic = torch.are_deterministic_algorithms_enabled()
        options = {**self._options(rule), "alibi_slopes": None, "deterministic": deterministic}
        self._backward(grad, q, k, v, out, lse, *written, **options)
        return written

    @staticmethod
    def _options(rule: Rule) -> dict[str, object]:
        longest_query, longest_key = _longest(rule.segments)
        left, right = _window(rule.segments)
        return {
            "cu_seqlens_q": rule.segments.queries,
            "cu_seqlens_k": rule.segments.keys,
            "max_seqlen_q": longest_query,
            "max_seqlen_k": longest_key,
            "dropout_p": 0.0,
            "softmax_scale": rule.scale,
            "causal": rule.segments.causal,
            "window_size_left": left,
            "window_size_right": right,
            "softcap": rule.softcap or 0.0,
        }


class FlashAttention3:
    """FlashAttention-3, for Hopper (package flash_attn_3), by the functions under its flash_attn_varlen_func."""

    softcaps = True

    def __init__(self) -> None:
        interface = importlib.import_module("flash_attn_interface")
        self._forward, self._backward = interface._flash_attn_forward, interface._flash_attn_backward

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._forward(q, k, v, causal=rule.segments.causal, **self._options(rule))
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
    ) -> Gradients:
        written = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        options = {**self._options(rule), **dict(zip(("dq", "dk", "dv"), written, strict=True))}
        options |= {
            "is_causal": rule.segments.causal,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        self._backward(grad, q, k, v, out, lse, **options)
        return written

    @staticmethod
    def _options(rule: Rule) -> dict[str, object]:
        both = FlashAttention._options(rule)
        return {name: value for name, value in both.items() if name not in ("dropout_p", "causal")}


def backend_for(q: Tensor, k: Tensor, v: Tensor, softcap: float | None = None) -> Backend | None:
    """Return the fastest backend for tensors [T, H, D], [S, Hk, D] that passed its trial; None where there is none."""
    return choose(BACKENDS, q, k, v, softcap)


def _flash_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether FlashAttention takes these tensors.

    It takes float16 and bfloat16 on CUDA, heads of up to 256 numbers, a multiple of 8, and values as wide as keys;
    between 192 and 256 not every GPU has its backward.
    """
    width = q.shape[-1]
    wide = width > 192 and width != 256
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or width % 8 or wide:
        return False
    return v.shape[-1] == width and {k.dtype, v.dtype} == {q.dtype}


def _backend(kind: type[Backend]) -> Implementation:
    """Make the table's entry of one backend."""
    return Implementation(
        serves=lambda q, k, v, softcap: _flash_takes(q, k, v) and (softcap is None or kind.softcaps),
        load=lambda q, k, v, softcap: _proven(kind, q.device, q.dtype, q.shape[-1]),
    )


BACKENDS = (_backend(FlashAttention3), _backend(FlashAttention), _backend(TorchFlash))


@functools.cache
def _proven(kind: type[Backend], device: torch.device, dtype: torch.dtype, width: int) -> Backend | None:
    """Return this backend if it is installed and passes a trial, which it may fail: both call private functions."""
    backend = next((b for b in installed(device) if type(b) is kind), None)
    if backend is None:
        return None
    try:
        fault = trial(backend, device, dtype, width)
    except Exception as e:  # whatever a private function raises once it has changed
        fault = f"{type(e).__name__}: {e}"
    if fault is None:
        return backend
    warnings.warn(f"{kind.__name__} is not used for attention over packs: {fault}", stacklevel=2)
    return None


def installed(device: torch.device) -> list[Backend]:
    """Return the backends that this machine has, fastest first."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return []
    found: list[Backend] = []
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    for kind in [FlashAttention3] * hopper + [FlashAttention]:
        with contextlib.suppress(ImportError, AttributeError):  # missing, built for another torch, or too old
            found.append(kind())
    if torch.backends.cuda.is_flash_attention_available():
        found.append(TorchFlash())
    return found


@torch.no_grad()
def trial(backend: Backend, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Compare a backend with `Plain` on a few ragged segments; return the fault in words, None if there is none."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 1, 70]), torch.tensor([9, 1, 90])
    plain = Plain()
    q, grad, out = (torch.randn(76, 4, width, generator=generator).to(device, dtype) for _ in range(3))
    k, v = (torch.randn(100, 2, width, generator=generator).to(device, dtype) for _ in range(2))
    for causal, window in ((False, None), (True, None), (True, 4)):
        for softcap in (None, 2.0) if backend.softcaps else (None,):
            rule = Rule(Segments.of(*lengths, causal, window, device), width**-0.5, softcap)
            with torch.autocast(device.type, enabled=False):
                expected_out, expected_lse = plain.forward(q.float(), k.float(), v.float(), rule)
                lse = expected_lse + 0.5  # as if more keys had been seen and `out` were the result
                expected = (
                    expected_out,
                    expected_lse,
                    *plain.backward(*(x.float() for x in (grad, q, k, v, out)), lse, rule),
                )
                mine = *backend.forward(q, k, v, rule), *backend.backward(grad, q, k, v, out, lse, rule)
            for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), mine, expected, strict=True):
                if x.shape != y.shape or not (x.float() - y).abs().max() <= 0.02 * y.abs().max():
                    return f"its {name} is not what the formula gives (causal {causal}, window {window})"
    return None

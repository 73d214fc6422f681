"""Attention over a pack without padding and without copies of the prompts, for the GPU.

A response token sees two sets of keys: (A) its prompt, and (B) its own response up to itself. Each is a varlen
attention over the pack as it lies: in (A) all responses to a prompt are one segment of queries, in (B) every prompt and
every response is a segment, which gives the prompts' own attention too. With w = sigmoid(lse_A - lse_B) the softmax
over both is

    out = w out_A + (1 - w) out_B        lse = log(e^lse_A + e^lse_B)

and as every gradient of attention is a sum over keys that knows the others by out and lse alone, the backward of each
part with the merged out and lse is exact.
"""

import torch
from torch import Tensor

from gspo.kernels.varlen import Backend, Rule
from gspo.packing.pack import PackedBatch


class _SharedPrefix(torch.autograd.Function):
    """q [T, H, D], k, v [S, Hk, D] -> [T, H, D]: (B) by the rule `inside`; then (A) by `across`, if there is one, for
    the tokens behind the first `prompts`."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, backend: Backend, inside: Rule, across: Rule | None, prompts: int
    ) -> Tensor:
        out, lse = backend.forward(q, k, v, inside)
        if across is not None:
            out_a, lse_a = backend.forward(q[prompts:], k[:prompts], v[:prompts], across)
            out_b, lse_b = out[prompts:], lse[:, prompts:]
            w = torch.sigmoid(lse_a - lse_b).T[..., None]
            out_b.copy_((w * out_a).addcmul_(1 - w, out_b))
            lse_b.copy_(torch.logaddexp(lse_a, lse_b))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = backend, inside, across, prompts
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        backend, inside, across, prompts = ctx.how
        grad = grad.contiguous()
        dq, dk, dv = backend.backward(grad, q, k, v, out, lse, inside)
        if across is not None:
            responses = (x[prompts:] for x in (grad, q))
            behind = out[prompts:], lse[:, prompts:].contiguous()
            dq_a, dk_a, dv_a = backend.backward(*responses, k[:prompts], v[:prompts], *behind, across)
            dq[prompts:] += dq_a
            dk[:prompts] += dk_a
            dv[:prompts] += dv_a
        return dq, dk, dv, None, None, None, None


def shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: PackedBatch,
    backend: Backend,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """query [T, H, D], key, value [T, Hk, D] of a pack -> [T, H, D].

    A window shorter than the longest sequence reaches from a response into its prompt, from each token less deep. There
    a response's keys are the prompt tokens that its first token reaches, then its own: copies, but of at most
    window - 1 tokens a response; and one causal varlen attention with a window is all of it. Tokens that responses
    share are multiplied for it, and one result of each is kept.
    """
    if pack.slots is not None:
        query, key, value = (x.index_select(0, pack.slots) for x in (query, key, value))
    out = _over_all(query, key, value, pack, backend, scale, softcap, window)
    return out if pack.held is None else out.index_select(0, pack.held)


def _over_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: PackedBatch,
    backend: Backend,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    if window is None or window >= pack.sequence_slots.shape[1]:
        inside, across = (Rule(x, scale, softcap) for x in (pack.inside, pack.across))
        return _SharedPrefix.apply(query, key, value, backend, inside, across, pack.prompt_tokens)
    places, segments = pack.within(window)
    key, value = (x.index_select(0, places) for x in (key, value))
    return _SharedPrefix.apply(query, key, value, backend, Rule(segments, scale, softcap), None, 0)

"""Attend over a pack on a GPU, without padding and without copies of the prompts.

A response token sees two sets of keys: (A) its prompt, and (B) its own response up to itself. Each is one varlen
attention over the pack: in (A) all responses to a prompt are one segment of queries; in (B) every prompt and every
response is a segment, which gives the prompts' own attention too. With w = sigmoid(lse_A - lse_B) the softmax over both
is

    out = w out_A + (1 - w) out_B        lse = log(e^lse_A + e^lse_B)

Every gradient of attention is a sum over keys in which the other keys appear only through out and lse, so the backward
of each part with the merged out and lse is exact.
"""

import torch
from torch import Tensor

from gspo.kernels.segment_attention import Backend, Rule
from gspo.packing.pack import PackedBatch


class _SharedPrefix(torch.autograd.Function):
    """Attend with q [T, H, D] over k, v [S, Hk, D] -> [T, H, D].

    (B) by the rule `inside`; then, if there is a rule `across`, (A) for the tokens after the first `prompts`.
    """

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
    """Attend with query [T, H, D] over key, value [T, Hk, D] of a pack -> [T, H, D].

    Tokens that responses share are copied for it, once for each response, and one result of each is kept.
    """
    if pack.merged_index is not None:
        query, key, value = (x.index_select(0, pack.merged_index) for x in (query, key, value))
    out = _unmerged_attention(query, key, value, pack, backend, scale, softcap, window)
    return out if pack.unmerged_index is None else out.index_select(0, pack.unmerged_index)


def _unmerged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: PackedBatch,
    backend: Backend,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Attend with one query, key and value for every token of every response, [U, H, D] -> [U, H, D].

    A window shorter than the longest sequence reaches from a response into its prompt, less deep from each next token.
    Then a response's keys are the prompt tokens that its first token reaches, and its own: copies, but of at most
    window - 1 tokens a response, and a single causal varlen attention with a window computes everything.
    """
    if window is None or window >= pack.sequence_index.shape[1]:
        inside, across = (Rule(x, scale, softcap) for x in (pack.prompts_and_responses, pack.responses_to_prompts))
        return _SharedPrefix.apply(query, key, value, backend, inside, across, pack.prompt_tokens)
    keys, segments = pack.window_segments(window)
    key, value = (x.index_select(0, keys) for x in (key, value))
    return _SharedPrefix.apply(query, key, value, backend, Rule(segments, scale, softcap), None, 0)

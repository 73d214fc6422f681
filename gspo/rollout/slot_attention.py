"""Attend in the sampler, by a function registered with transformers under the name `SLOTS`.

Prefill: prompts attend causally to themselves, once, and write their keys and values to pages. Decoding: a new token
attends to its prompt's pages and to its own response's. All responses to a prompt read its pages together, in one
matrix product (Hydragen, Juravsky et al. 2024), each slot reads its own pages, and the two parts are merged by their
log-sum-exp.
"""

import math
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from gspo.errors import UserError
from gspo.kernels.amx_nan_guard import whole_tiles
from gspo.kernels.decode_attention import decode_attention
from gspo.kernels.decode_attention_cpu import Pool, decode_step
from gspo.kernels.native import cpu_kernels_take, has_storage
from gspo.kernels.packed_attention_cpu import NO_ROWS, rows_attention, rows_kernel_takes
from gspo.kernels.segment_attention import Rule, backend_for
from gspo.models.attention_support import (
    attention_implementation,
    check_architecture,
    check_attention_arguments,
    ordinary_token,
    plain_attention,
    short_windows,
    unsupported_model,
)
from gspo.rollout.attention_inputs import Prefill, Step, pack_prompts
from gspo.rollout.cuda_graph_tables import FixedStep, Tables
from gspo.rollout.kv_pages import PAGE, Layer, Plan
from gspo.rollout.slots import Slots

SLOTS = "gspo_slots"
LN2 = math.log(2)
QUERIES = 128  # of a prompt at a time: their scores stay in the CPU's cache, and half of the hidden ones are skipped
TOLERANCE = {torch.float32: 1e-4}  # mean error of a logit at the median token / the logits' mean size
HALF_TOLERANCE = 0.3  # in half precision, where a model run as one batch and as two may differ, at times completely
Part = tuple[Tensor, Tensor]  # attention over some of the keys [..., Dv], and its log-sum-exp, base 2 [..., 1]


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    slots: Prefill | Step | FixedStep | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers calls it: query [B, H, Q, D], key, value [B, Hk, Q, D] -> [B, Q, H, Dv].

    B = 1 and Q = T for a `Prefill`, B = S and Q = 1 for a step. Raises UserError where the model asks for another kind
    of attention than this.
    """
    assert attention_mask is None and dropout == 0.0, (
        "transformers builds no mask for us, and a sampler is in eval mode"
    )
    check_attention_arguments(module, slots, options)
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise unsupported_model(module.config, "does not number its layers")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = {Prefill: attend_prompts, Step: attend_slots, FixedStep: attend_fixed}[type(slots)]
    return attend(slots, layer, query, key, value, scale, softcap, options.get("sliding_window") or None), None


AttentionInterface.register(SLOTS, slot_attention)


def attend_prompts(
    prefill: Prefill, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    """Attend causally within each prompt, query [1, H, T, D] -> [1, T, H, Dv]; write keys and values to its pages."""
    if prefill.pool is None:
        prefill.layout[layer] = Layer(key.shape[1], key.shape[3], value.shape[3], key.dtype)
    else:
        rows = (x[0].transpose(0, 1).flatten(0, 1) for x in (key, value))
        prefill.pool.write(layer, prefill.places(key.shape[1]), *rows)
        prefill.pool.attention_kinds_seen.add((scale, softcap, window))
    tokens = [x[0].transpose(0, 1) for x in (query, key, value)]
    if (backend := backend_for(*tokens, softcap)) is not None:
        return backend.forward(*(x.contiguous() for x in tokens), Rule(prefill.segments(window), scale, softcap))[0][
            None
        ]
    if rows_kernel_takes(*tokens):
        return rows_attention(*tokens, prefill.rows if has_storage(query) else NO_ROWS, scale, softcap, window)[None]
    heads, kv_heads = query.shape[1], key.shape[1]
    out = query.new_empty(query.shape[2], heads, value.shape[3])
    start = 0
    for size, alike in groupby(prefill.sizes):  # neighbours of one length go together
        count = len(list(alike))
        mine = slice(start, start := start + count * size)
        q, keys, values = (x[0, :, mine].unflatten(1, (count, size)) for x in (query, key, value))
        keys, values = (x.flatten(0, 1).contiguous() for x in (keys, values))
        found = out[mine].view(count, size, heads, -1)
        for at in range(0, size, QUERIES):
            end = min(at + QUERIES, size)
            first = 0 if window is None else max(0, at + 1 - window)
            some = (
                q[:, :, at:end].unflatten(0, (kv_heads, -1)).transpose(1, 2).reshape(kv_heads * count, -1, q.shape[3])
            )
            shape = (kv_heads * count, heads // kv_heads, end - at)
            bias = prefill.bias(at, end, first, window)
            sums, total, _ = weigh(some, keys[:, first:end], values[:, first:end], shape, bias, scale, softcap)
            sums = sums.div_(total).view(kv_heads, count, *sums.shape[1:])
            found[:, at:end] = sums.permute(1, 3, 0, 2, 4).flatten(2, 3)
    return out[None]


def attend_slots(
    step: Step, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    """Attend from one new token a slot, query [S, H, 1, D], to its prompt and its response so far -> [S, 1, H, Dv]."""
    if (
        cpu_kernels_take(query, key, value, step.responses.keys[layer]) and query.shape[-1] % 2 == 0
    ):  # halves go by pairs
        tokens = (x[:, :, 0] for x in (query, key, value))
        read = (
            Pool(x.keys[layer], x.values[layer], y) for x, y in zip(step.pools, step.sequences(window), strict=True)
        )
        return decode_step(*tokens, *read, step.page, step.offset, scale, softcap)[:, None]
    count, heads, _, width = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    step.responses.write(layer, step.places(kv_heads), key[:, :, 0].flatten(0, 1), value[:, :, 0].flatten(0, 1))

    q = query.reshape(count, kv_heads, group, width)
    keys, values = step.responses.read(layer, len(step.response_owner))
    bias = step.response_bias(window)
    own = attend_pages(q, keys, values, step.response_owner, step.response_only, bias, scale, softcap)

    prompts, most = step.members.shape
    q = q.index_select(0, step.members.flatten()).view(prompts, most, kv_heads, group, width)
    q = q.transpose(1, 2).reshape(prompts, kv_heads, most * group, width)
    keys, values = step.prompts.read(layer, len(step.prompt_owner))
    bias = step.prompt_bias(window, group)
    shared = attend_pages(q, keys, values, step.prompt_owner, step.prompt_only, bias, scale, softcap)
    shared = [
        x.view(prompts, kv_heads, most, group, -1).transpose(1, 2).flatten(0, 1).index_select(0, step.member_index)
        for x in shared
    ]
    weight = torch.sigmoid((shared[1] - own[1]) * LN2)  # of the prompt: 2^a / (2^a + 2^b)
    return torch.lerp(own[0], shared[0], weight).to(query.dtype).reshape(count, 1, heads, -1)


def attend_fixed(
    step: FixedStep, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    """Attend as `attend_slots` does, by tables on the device and in shapes that do not depend on their contents."""
    step.write(layer, key[:, :, 0], value[:, :, 0])
    return decode_attention(query[:, :, 0], *step.pools(layer), step.flat_positions, scale, softcap, window)[:, None]


def attend_pages(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    owner: Tensor,
    only: Tensor | None,
    bias: Tensor,
    scale: float,
    softcap: float | None,
) -> Part:
    """Attend with queries q [O, Hk, M, D] of O owners to pages keys, values [n, Hk, page, D], owned by owner [n].

    only [O] is the page of each owner where none has more than one, so that there is nothing to merge;
    bias [n, 1, 1 or M, page] is 0 on keys that are seen and HIDDEN elsewhere. -> outputs [O, Hk, M, Dv] and the
    log-sum-exp of their scores [O, Hk, M, 1], base 2, float32.
    """
    n, kv_heads = keys.shape[:2]
    rows = q.index_select(0, owner).flatten(0, 1)
    shape = (n, kv_heads, rows.shape[1])
    out, total, top = weigh(rows, keys.flatten(0, 1), values.flatten(0, 1), shape, bias, scale, softcap)
    if only is not None:
        return out.div_(total).index_select(0, only), top.add_(total.log2_()).index_select(0, only)
    where = owner[:, None, None, None].expand_as(top)
    peak = top.new_full((len(q), *top.shape[1:]), -torch.inf).scatter_reduce_(0, where, top, "amax")
    share = top.sub_(peak.index_select(0, owner)).exp2_()
    total = torch.zeros_like(peak).index_add_(0, owner, total.mul_(share))
    out = out.new_zeros(len(q), *out.shape[1:]).index_add_(0, owner, out.mul_(share))
    return out.div_(total), peak.add_(total.log2_())


def weigh(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    shape: tuple[int, int, int],
    bias: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute an unnormalized softmax: q [B, M, D], keys [B, K, D], values [B, K, Dv], bias [..., K].

    `shape` is what B * M is viewed as, to match the bias. -> the values weighted by 2^(score - top) [*shape, Dv], the
    sums of these weights and top [*shape, 1], in float32; products are in the keys' dtype. On CPUs exp2 takes a third
    of exp's time, and a twelfth where exp underflows.
    """
    scores = torch.bmm(whole_tiles(q), whole_tiles(keys).transpose(1, 2)).view(*shape, -1)
    if softcap is not None:
        scores, scale = torch.tanh(scores.float() * (scale / softcap)), softcap
    scores = torch.add(bias, scores, alpha=scale / LN2)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp2_()
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights.to(values.dtype).view(*q.shape[:2], -1), values)
    return out.float().view(*shape, -1), total, top


def forward(model: nn.Module, slots: Prefill | Step | FixedStep, tokens: Tensor | None = None) -> Tensor:
    """Run the model over prompts -> logits [B, V] at their last tokens; over one token [S] a slot -> logits [S, V]."""
    with attention_implementation(model.config.get_text_config(), SLOTS):
        if not isinstance(slots, Prefill):
            given = {"input_ids": tokens[:, None], "position_ids": slots.positions}
            return model(**given, use_cache=False, slots=slots).logits[:, -1]
        given = {"input_ids": slots.ids, "position_ids": slots.positions}
        logits = model(**given, use_cache=False, logits_to_keep=slots.last, slots=slots).logits[0]
    return logits if len(logits) == len(slots.last) else logits[slots.last]  # not every class takes indices


@torch.no_grad()
def check_slots(model: nn.Module, device: torch.device, fixed: bool = False) -> dict[int, Layer]:
    """Return what each layer keeps of a token; raise UserError unless slots give the logits of plain forwards.

    A few tokens are decoded by steps, with `fixed` from a CUDA graph's tables. This finds what no configuration says: a
    model that keeps state of its own, that counts positions itself, or that passes unknown arguments to its attention.
    """
    check_architecture(model.config)
    with short_windows(model) as window:
        error, size, tolerance, layout = _slots_error(model, device, fixed)
    if error > tolerance * size:
        raise unsupported_model(model.config, f"{window}does not compute one token at a time what it computes at once")
    return layout


def _slots_error(model: nn.Module, device: torch.device, fixed: bool) -> tuple[float, float, float, dict[int, Layer]]:
    """Return (median error of a step's logits, their size, the tolerance, what each layer keeps of a token)."""
    first = ordinary_token(model.config)
    prompts = [(first + 3, first + 1, first + 4), (first + 1,)]
    responses = first + torch.tensor([[1, 5, 9], [2, 6, 5], [5, 3, 5]], device=device)
    try:
        probe = pack_prompts([(0,)], device)
        forward(model, probe)
        page = PAGE if fixed else 2
        slots = Slots(probe.layout, Plan(3, 3, 3, page=page, prompt_page=page), device)
        logits = forward(model, slots.prefill([0, 1], prompts))
        slots.seat([0, 1, 2], owners := [0, 0, 1])
        step = partial(_fixed_step, Tables(slots, 3, 2, 3, 3)) if fixed else slots.step
        mine = [logits[owners]] + [forward(model, step(), responses[:, t]) for t in range(2)]
    except UserError:
        raise
    except (TypeError, KeyError, AttributeError, ValueError, IndexError) as e:
        raise unsupported_model(model.config, f"cannot be run token by token ({type(e).__name__}: {e})") from e
    plain = []
    for owner, response in zip(owners, responses.tolist(), strict=True):
        ids = torch.tensor([[*prompts[owner], *response]], device=device)
        with plain_attention(model.config):
            plain.append(model(input_ids=ids, use_cache=False).logits[0, -4:-1].float())
    tolerance = TOLERANCE.get(logits.dtype, HALF_TOLERANCE)
    mine, plain = torch.stack(mine, 1).float(), torch.stack(plain)
    size = (plain - plain.mean(-1, keepdim=True)).abs().mean()
    return float((mine - plain).abs().mean(-1).median()), float(size), tolerance, probe.layout


def _fixed_step(tables: Tables) -> FixedStep:
    """Return the only step of a block."""
    slots = tables.slots
    tables.load(len(slots), slots.length + 1, spare_row=len(slots))
    slots.length = slots.length + 1
    return FixedStep(tables, len(slots))

"""Attention over a pack in two parts equals attention row by row with a mask; and which tensors take which way."""

import dataclasses
import sys
import types

import pytest
import torch
from architectures import tiny_model
from pack_cases import KINDS, LARGE, PACKS, SCALE, a_pack, by_rows, draw, outcome
from plain_logprobs import RAGGED, SOME_ROWS, assert_plain

from gspo.kernels import segment_attention
from gspo.kernels.segment_attention import FlashAttention, FlashAttention3, Plain, Rule, Segments, TorchFlash
from gspo.packing import packed_attention as attention
from gspo.packing.shared_prefix_attention import shared_prefix_attention

HALF = torch.bfloat16


def two_parts(packed, **kind):
    return lambda q, k, v: shared_prefix_attention(q, k, v, packed, Plain(), SCALE, **kind)


def worst(mine, expected):
    return max(float((x - y).abs().max() / y.abs().max().clamp(min=1.0)) for x, y in zip(mine, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alphabet", [10**9, 2], ids=["all different", "beginnings alike"])
@pytest.mark.parametrize("shape", PACKS)
def test_outputs_and_gradients_equal_those_row_by_row(shape, alphabet, kind):
    """Grouped queries, and values narrower than keys; in float64, and in float32 as near as rows are."""
    packed = a_pack(PACKS[shape], alphabet=alphabet)
    tensors = draw(packed, 4, 2, 6, value_width=5)
    expected = outcome(by_rows(packed, **KINDS[kind]), tensors)
    assert worst(outcome(two_parts(packed, **KINDS[kind]), tensors), expected) < 1e-12
    single = [x.float() for x in tensors]
    assert worst(outcome(two_parts(packed, **KINDS[kind]), single), expected) < 5e-6


def test_scores_far_apart_do_not_overflow():
    """A response that sees nothing but its prompt, or next to nothing of it: weights of 1 and 0."""
    packed = a_pack(PACKS["ragged groups"])
    q, k, v, grad = draw(packed, 2, 2, 4)
    for tokens in (slice(None, packed.prompt_tokens), slice(packed.prompt_tokens, None)):
        far = k.clone()
        far[tokens] *= 1e4
        expected = outcome(by_rows(packed), (q, far, v, grad))
        assert worst(outcome(two_parts(packed), (q, far, v, grad)), expected) < 1e-10


@pytest.mark.parametrize("kind", ["full", "softcap", "window within prompts"])
def test_the_backward_is_the_finite_difference(kind):
    packed = a_pack(([3, 1], [0, 0, 1], [2, 1, 4]))
    q, k, v, _ = (x.requires_grad_() for x in draw(packed, 2, 1, 2))
    assert torch.autograd.gradcheck(two_parts(packed, **KINDS[kind]), (q, k, v), atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "deepseek_v3"])
def test_whole_models_equal_plain_transformers(family, monkeypatch):
    monkeypatch.setattr(attention, "backend_for", lambda *_: Plain())
    monkeypatch.setattr(attention, "_padded_attention", None)
    assert_plain(tiny_model(family), RAGGED, SOME_ROWS)


def test_the_trial_passes_the_formulas_and_names_what_is_wrong():
    class Transposed(Plain):
        def forward(self, *args):
            out, lse = super().forward(*args)
            return out, lse.T

    class OwnSoftmax(Plain):  # a backward that computes what it was to be given
        def backward(self, grad, q, k, v, out, lse, rule):
            return super().backward(grad, q, k, v, *self.forward(q, k, v, rule), rule)

    class AlignedAtTheStart(Plain):
        def forward(self, q, k, v, rule):
            return super().forward(q, k, v, Rule(dataclasses.replace(rule.segments, causal=False), *rule[1:]))

    at = torch.device("cpu"), torch.float32, 16
    assert segment_attention.trial(Plain(), *at) is None
    assert "lse" in segment_attention.trial(Transposed(), *at)
    assert "dq" in segment_attention.trial(OwnSoftmax(), *at)
    assert "causal True" in segment_attention.trial(AlignedAtTheStart(), *at)


def flash_rule(cu_q, cu_k, longest, scale, causal, left, right, softcap):
    assert right == (-1 if left == -1 else 0) and min(longest) > 1
    return Rule(Segments(cu_q, cu_k, *longest, causal, None if left == -1 else left + 1), scale, softcap or None)


def test_the_flash_attn_package_is_called_by_its_own_names(monkeypatch):
    """The signatures of flash_attn 2.8.3, around the formulas: every argument arrives, and the trial sees no fault."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        longest, window = (max_seqlen_q, max_seqlen_k), (window_size_left, window_size_right)
        how = flash_rule(cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, causal, *window, softcap)
        return *Plain().forward(q, k, v, how), None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        longest, window = (max_seqlen_q, max_seqlen_k), (window_size_left, window_size_right)
        how = flash_rule(cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, causal, *window, softcap)
        for x, y in zip((dq, dk, dv), Plain().backward(dout, q, k, v, out, softmax_lse, how), strict=True):
            x.copy_(y)

    package = types.ModuleType("flash_attn.flash_attn_interface")
    package._flash_attn_varlen_forward = _flash_attn_varlen_forward
    package._flash_attn_varlen_backward = _flash_attn_varlen_backward
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", package)
    assert segment_attention.trial(FlashAttention(), torch.device("cpu"), torch.float32, 16) is None


def test_flash_attention_3_is_called_by_its_own_names_on_hopper_alone(monkeypatch):
    """The signatures of flash_attn_3, around the formulas; older versions take another window, and fail their trial."""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0,
        num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        longest, window = (max_seqlen_q, max_seqlen_k), (window_size_left, window_size_right)
        how = flash_rule(cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, causal, *window, softcap)
        return *Plain().forward(q, k, v, how), torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        longest, window = (max_seqlen_q, max_seqlen_k), (window_size_left, window_size_right)
        how = flash_rule(cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, is_causal, *window, softcap)
        for x, y in zip((dq, dk, dv), Plain().backward(dout, q, k, v, out, softmax_lse, how), strict=True):
            x.copy_(y)

    package = types.ModuleType("flash_attn_interface")
    package._flash_attn_forward, package._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    assert segment_attention.trial(FlashAttention3(), torch.device("cpu"), torch.float32, 16) is None
    for capability, first in (((9, 0), FlashAttention3), ((8, 0), TorchFlash), ((10, 0), TorchFlash)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        assert type(segment_attention.installed(torch.device("cuda", 0))[0]) is first


def test_which_tensors_go_to_which_backend(monkeypatch):
    """By shape and dtype alone: tensors of a GPU that is not there, none proven but one without softcaps."""
    torch_flash = TorchFlash()
    monkeypatch.setattr(segment_attention, "_proven", lambda kind, *_: torch_flash if kind is TorchFlash else None)

    def chosen(width=64, dtype=HALF, value=None, device="cuda", **options):
        q, k, v = (torch.empty(8, 2, n, dtype=dtype, device=device) for n in (width, width, value or width))
        return segment_attention.backend_for(q, k, v, **options)

    assert chosen(device="cpu") is None
    with torch._subclasses.FakeTensorMode():
        assert chosen() is chosen(256) is chosen(8, torch.float16) is torch_flash
        refused = [
            {"dtype": torch.float32},
            {"width": 12},
            {"width": 264},
            {"width": 224},
            {"value": 32},
            {"softcap": 5.0},
        ]
        assert [chosen(**case) for case in refused] == [None] * len(refused)


@pytest.mark.parametrize("part", ["prompts_and_responses", "responses_to_prompts", "window"])
def test_torch_takes_the_calls_of_its_backend(part):
    """Signatures, shapes and dtypes, by tensors that claim to be on a GPU (numbers: test_attention_on_cuda.py)."""
    packed = a_pack(LARGE)
    segments = packed.window_segments(50)[1] if part == "window" else getattr(packed, part)
    with torch._subclasses.FakeTensorMode():
        offsets = {
            name: torch.empty(len(segments.keys), dtype=torch.int32, device="cuda") for name in ("queries", "keys")
        }
        rule = Rule(dataclasses.replace(segments, **offsets), SCALE)
        q, k, v = (torch.empty(n, h, 64, dtype=HALF, device="cuda") for n, h in ((700, 4), (900, 2), (900, 2)))
        out, lse = TorchFlash().forward(q, k, v, rule)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, HALF, (4, 700), torch.float32)
        gradients = TorchFlash().backward(out, q, k, v, out, lse, rule)
    assert [(x.shape, x.dtype, x.device.type) for x in gradients] == [(x.shape, HALF, "cuda") for x in (q, k, v)]

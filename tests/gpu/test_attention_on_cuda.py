"""Attention over packs on CUDA (`make test-gpu`), by every backend that is there; skipped where there is no CUDA."""

import pytest
import torch
from architectures import tiny_model
from pack_cases import KINDS, LARGE, PACKS, SCALE, a_pack, by_rows, draw, outcome

from gspo.kernels import segment_attention
from gspo.packing import packed_attention as attention
from gspo.packing.logprobs import response_logprobs
from gspo.packing.probe_head import measure_head
from gspo.packing.shared_prefix_attention import shared_prefix_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.usefixtures("poisoned"),
]
BACKENDS = ["FlashAttention", "TorchFlash"]
WIDTHS = [8, 64, 80, 96, 128, 192, 256]
HALVES = [torch.bfloat16, torch.float16]


def the_backend(name):
    found = [b for b in segment_attention.installed(torch.device("cuda", 0)) if type(b).__name__ == name]
    return found[0] if found else pytest.skip(f"no {name} here")


def errors(mine, exact):
    """Of each tensor: the largest and the root of the mean squared error."""
    return [
        ((x.double() - y).abs().max(), (x.double() - y).square().mean().sqrt())
        for x, y in zip(mine, exact, strict=True)
    ]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", BACKENDS)
def test_the_trial_passes(name, width, dtype):
    assert segment_attention.trial(the_backend(name), torch.device("cuda", 0), dtype, width) is None


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["heads", "grouped"])
@pytest.mark.parametrize("kind", [*KINDS, "window of 100"])
@pytest.mark.parametrize("name", BACKENDS)
def test_two_parts_are_as_near_to_float64_as_rows(name, kind, heads, dtype):
    """From the same half-precision inputs; one more rounding than PyTorch's own attention of padded rows."""
    backend, options = the_backend(name), KINDS.get(kind, {"window": 100})
    if options.get("softcap") is not None and not backend.softcaps:
        pytest.skip("takes no softcap")
    for label, shape in {**PACKS, "large": LARGE}.items():
        packed = a_pack(shape, "cuda")
        half = [x.to("cuda", dtype) for x in draw(packed, *heads, 64)]
        exact = outcome(by_rows(packed, **options), [x.double() for x in half])
        theirs = errors(outcome(by_rows(packed, **options), half), exact)
        two_parts = outcome(
            lambda q, k, v, p=packed: shared_prefix_attention(q, k, v, p, backend, SCALE, **options), half
        )
        eps = torch.finfo(torch.bfloat16).eps if dtype == torch.bfloat16 else torch.finfo(dtype).eps
        for what, x, mine, rows in zip(("out", "dq", "dk", "dv"), exact, errors(two_parts, exact), theirs, strict=True):
            size = x.abs().max().clamp(min=1.0)
            assert mine[0] <= 2 * rows[0] + eps * size, f"{label}: {what} {mine[0]} rows {rows[0]}"
            assert mine[1] <= 2 * rows[1] + eps / 2 * x.square().mean().sqrt().clamp(min=1.0), f"{label}: {what}"


def test_a_proven_backend_is_chosen():
    device = torch.device("cuda", 0)
    if not segment_attention.installed(device):
        pytest.skip("no backend here")
    q, k = (torch.zeros(8, heads, 64, dtype=torch.bfloat16, device=device) for heads in (4, 2))
    assert type(segment_attention.backend_for(q, k, k)) is type(segment_attention.installed(device)[0])


@pytest.mark.parametrize("cast", ["weights", "autocast"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text"])
def test_whole_models_in_bf16_are_as_near_to_float32_as_rows(family, cast, monkeypatch):
    """Without the padded rows, also where autocast leaves queries in float32; gemma2 by a backend with softcaps."""
    packed = a_pack(PACKS["ragged groups"], "cuda", alphabet=97)
    model = tiny_model(family).cuda()
    head = measure_head(model)
    with torch.no_grad():
        exact = response_logprobs(model, head, packed, 1.0)
    if cast == "weights":
        model = model.bfloat16()
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    example = torch.zeros(2, 2, 8, dtype=torch.bfloat16, device="cuda")
    backend = segment_attention.backend_for(example, example, example, softcap)
    if backend is None:
        pytest.skip("no backend here")
    results = []
    for chosen, padded in ((lambda *_: None, attention._padded_attention), (segment_attention.backend_for, None)):
        monkeypatch.setattr(attention, "backend_for", chosen)
        monkeypatch.setattr(attention, "_padded_attention", padded)
        with torch.autocast("cuda", torch.bfloat16, enabled=cast == "autocast"):
            results.append(response_logprobs(model, head, packed, 1.0))
    rows, mine = ((x.detach() - exact).abs() for x in results)
    assert mine.max() <= 3 * rows.max() + 0.02 and mine.mean() <= 2 * rows.mean() + 0.005
    results[1].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

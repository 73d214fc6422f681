"""The kernels on CUDA (`make test-gpu`); skipped where there is none."""

import pytest
import torch
from logprob_cases import HEADS, Case, cases, draw, outcome, too_far

from gspo.kernels import logprob, logprob_chunk
from gspo.kernels.dispatch import choose
from gspo.kernels.ops import linear_logprob

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.fixture()
def small_chunks(monkeypatch):
    monkeypatch.setitem(logprob.CHUNK_BYTES, "cuda", 0)
    monkeypatch.setitem(logprob.LEAST_WIDTH, "cuda", 128)
    monkeypatch.setattr(logprob, "LEAST_PIECE", 16)


@pytest.mark.parametrize("known", [False, True], ids=["backward", "and_grad"])
def test_small_cases_are_as_near_to_float64_as_plain_pytorch(small_chunks, known):
    found = choose(logprob.IMPLEMENTATIONS, torch.zeros(1, device="cuda"), torch.bfloat16)
    assert found.__name__ == "gspo.kernels.logprob_chunk_triton"
    wrong = [line for case in cases() for line in too_far(case, "cuda", known)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [32_000, 50_257])
def test_chunks_as_they_are_used(dtype, vocabulary):
    wrong = []
    for head in HEADS:
        for keep in (0, None):
            wrong += too_far(Case(1500, 512, vocabulary, dtype, **head, keep=keep), "cuda")
    assert not wrong, "\n".join(wrong)


def test_a_chunk_of_more_than_2_to_the_31_elements():
    """The last rows of 4.3 GB of products, at 64-bit offsets, against the same pass in PyTorch."""
    from gspo.kernels import logprob_chunk_triton

    tokens, width, last = 66_000, 32_640, slice(65_990, 66_000)
    raw = torch.zeros(tokens, 32_768, dtype=torch.bfloat16, device="cuda")[:, :width]
    raw[last] = torch.randn(10, width, device="cuda").bfloat16()
    targets = torch.randint(width, (tokens,), device="cuda")
    transform = logprob_chunk.LogitTransform.of(1.0, None, 0.9)
    stats, expected = (logprob_chunk.new_stats(n, raw) for n in (tokens, 10))
    logprob_chunk_triton.add_statistics(raw, 0, targets, stats, transform)
    logprob_chunk.add_statistics(raw[last], 0, targets[last], expected, transform)
    torch.testing.assert_close(stats[:, last], expected, rtol=1e-5, atol=1e-4)
    rows = torch.stack([stats[0], stats[1].log(), torch.ones(tokens, device="cuda")])
    gradient = raw[last].clone()
    logprob_chunk.to_gradient(gradient, 0, targets[last], rows[:, last].contiguous(), transform)
    logprob_chunk_triton.to_gradient(raw, 0, targets, rows, transform)
    torch.testing.assert_close(raw[last], gradient, rtol=1e-2, atol=1e-6)


def test_memory_above_the_gradients_is_under_a_gibibyte():
    torch.use_deterministic_algorithms(False)
    inputs = draw(Case(4096, 4096, 131_072, torch.bfloat16), "cuda")
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value = linear_logprob(hidden, weight, inputs["targets"])
    (value * inputs["slope"]).sum().backward()
    extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes
    assert extra <= 2**30, extra / 2**20


def test_repeated_runs_give_the_same_bits():
    """No atomics and no exchange between programs: a difference would be a race."""
    case = Case(777, 256, 40_003, torch.bfloat16, softcap=20.0)
    inputs = draw(case, "cuda")
    first, *others = [outcome(linear_logprob, case, inputs, torch.bfloat16) for _ in range(5)]
    for other in others:
        for key, x in first.items():
            assert torch.equal(other[key], x), key

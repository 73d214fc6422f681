"""The sampling engine on CUDA (`make test-gpu`): its kernels, its steps as graphs; skipped where there is no CUDA."""

import warnings

import pytest
import torch
from architectures import FAMILIES, tiny_model
from chi_square import chi_square
from decode_cases import Case, cases, too_far
from sampling_cases import Case as Draw
from sampling_cases import cases as draws
from sampling_cases import differences, keys_of, observed
from tiny_sampler import Tokens, prompts_of
from transformers import GenerationConfig

from gspo.kernels import decode_attention, decode_attention_triton
from gspo.kernels.dispatch import choose
from gspo.kernels.draw_token import sample
from gspo.packing.logprobs import response_logprobs
from gspo.packing.pack import pack_rows
from gspo.packing.probe_head import measure_head
from gspo.rollout.cuda_graphs import Replay, no_waiting
from gspo.rollout.draw_tokens import Sampling, uniforms
from gspo.rollout.sampler import Sampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.usefixtures("poisoned"),
]
HALVES = [torch.bfloat16, torch.float16]
LIMITS = torch.tensor([[40, 1, 7], [2, 40, 4], [23, 3, 9], [5, 40, 1]])


# ---- attention ----


def test_small_cases_are_as_near_to_float64_as_plain_pytorch(monkeypatch):
    for share in (32, decode_attention_triton.SHARE):
        monkeypatch.setattr(decode_attention_triton, "SHARE", share)
        found = choose(decode_attention.IMPLEMENTATIONS, torch.zeros(1, device="cuda"))
        assert found.__module__ == "gspo.kernels.decode_attention_triton"
        wrong = [line for case in cases() for line in too_far(case, "cuda")]
        assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    "shape", [(14, 2, 64, 64), (32, 8, 128, 128), (8, 4, 256, 256), (32, 32, 80, 80), (4, 4, 192, 128)]
)
def test_shapes_of_real_models(shape, dtype):
    heads, kv_heads, width, value_width = shape
    wrong = []
    for window, softcap in ((None, None), (700, 30.0)):
        case = Case(
            dtype, heads, kv_heads, width, value_width, 64, 512, softcap, window,
            ((2100, 8), (0, 1), (512, 16), (1, 5)), 16, 1500,
        )  # fmt: skip
        wrong += too_far(case, "cuda")
    assert not wrong, "\n".join(wrong)


# ---- draws ----


def test_draws_are_those_of_pytorch():
    large = [
        Draw(64, 151_936, dtype, s, kind)
        for dtype in (torch.float32, torch.bfloat16)
        for s in (
            Sampling(0.9),
            Sampling(0.0),
            Sampling(0.8, top_k=50, top_p=0.95, min_p=0.01),
            Sampling(1.0, top_p=0.9),
        )
        for kind in ("normal", "peaked")
    ]
    wrong = [line for case in draws() + large for line in differences(case, "cuda")]
    assert not wrong, "\n".join(wrong)


def test_uniforms_have_the_same_leading_bits():
    """Over equal logits a draw is a number between 0 and 1 by itself."""
    keys, positions = keys_of(5000, "cuda")
    tokens, _, _ = sample(torch.zeros(1, 65_536, device="cuda").expand(5000, -1), keys, positions, 1.0)
    assert tokens.equal((uniforms(keys, positions) * 65_536).ceil().long() - 1)


@pytest.mark.parametrize(
    "sampling", [Sampling(0.8), Sampling(1.2, top_k=30, top_p=0.9), Sampling(1.0, min_p=0.1)], ids=str
)
def test_tokens_follow_the_softmax_over_what_is_kept(sampling):
    counts, expected = observed(300, sampling, 100_000, "cuda")
    common = expected >= 5
    rest = lambda x: torch.cat([x[common], x[~common].sum()[None]])  # noqa: E731
    assert abs(chi_square(rest(counts), rest(expected))) < 4


# ---- the engine ----


def sampler_on(device, model, **options):
    model = model.to(device)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return Sampler(model, Tokens(), torch.device(device), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_the_tokens_of_the_cpu(family):
    """Greedy, with windows, soft caps and refills; blocks of eight against a look at every token."""
    sampling, rollouts = Sampling(0.0, max_new_tokens=40), []
    for device in ("cpu", "cuda"):
        sampler = sampler_on(device, tiny_model(family, max_position_embeddings=256), max_slots=5)
        rollouts.append(sampler.generate(prompts_of((3, 11, 1, 7)), 3, sampling, limits=LIMITS))
    cpu, gpu = rollouts
    assert gpu.tokens.cpu().equal(cpu.tokens) and gpu.lengths.cpu().equal(cpu.lengths) and gpu.texts == cpu.texts
    torch.testing.assert_close(gpu.logprobs.cpu(), cpu.logprobs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gpu.entropy.cpu(), cpu.entropy, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_are_recorded_and_give_the_bits_of_plain_steps(dtype, monkeypatch):
    """Forty slots, then fewer: graphs of 40, 20 and 10."""
    limits, made, begin = torch.arange(1, 121).view(5, 24) % 60 + 1, [], Replay.__init__
    monkeypatch.setattr(Replay, "__init__", lambda r, *a, **k: begin(r, *a, **k) or made.append(r))
    results = []
    for call in (Replay.__call__, lambda replay, work, size: work(size)):
        monkeypatch.setattr(Replay, "__call__", call)
        sampler = sampler_on("cuda", tiny_model("qwen2").to(dtype), max_slots=40)
        sampling = Sampling(1.0, max_new_tokens=60, top_p=0.95)
        results.append(sampler.generate(prompts_of((3, 90, 1, 7, 30)), 24, sampling, limits=limits))
    assert set(made[0]._graphs) == {40, 20, 10} and all(made[0]._graphs.values()) and not made[1]._graphs
    assert results[0].tokens.equal(results[1].tokens) and results[0].logprobs.equal(results[1].logprobs)


def test_ranks_that_agree_on_tokens_record_graphs_too(monkeypatch):
    """As ranks of a tensor-parallel model do: the agreement is part of the step."""
    made, begin, agreed = [], Replay.__init__, []
    monkeypatch.setattr(Replay, "__init__", lambda r, *a, **k: begin(r, *a, **k) or made.append(r))
    agree = lambda x: agreed.append(x.shape) or x  # noqa: E731
    sampling = Sampling(1.0, max_new_tokens=40)
    together = sampler_on("cuda", tiny_model("qwen2"), agree=agree).generate(prompts_of((3, 9)), 4, sampling)
    alone = sampler_on("cuda", tiny_model("qwen2")).generate(prompts_of((3, 9)), 4, sampling)
    assert any(made[0]._graphs.values()) and len(agreed) < 20  # steps that were replayed did not come by here
    assert together.tokens.equal(alone.tokens)


def test_the_host_does_not_wait_for_single_tokens():
    """Twice as many tokens in as many answers: a few more looks for every eight further tokens."""
    sampler, waits = sampler_on("cuda", tiny_model("llama", max_position_embeddings=512)), []
    sampler.end_ids = set()
    for longest in (128, 128, 256):  # the first compiles
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                sampler.generate(prompts_of((5, 9)), 8, Sampling(1.0, max_new_tokens=longest))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(w.message) for w in caught))
    assert waits[2] - waits[1] <= 12 * 128 // 8, waits


def test_work_that_waits_is_run_as_it_is(capsys):
    total, value = torch.zeros(1, device="cuda"), torch.ones(1, device="cuda")

    def work(size):
        amount = value.item()
        total.add_(size * amount)

    replay = Replay(torch.device("cuda"))
    for _ in range(4):
        replay(work, 3)
    assert total.item() == 12 and "without CUDA graphs" in capsys.readouterr().err
    with pytest.raises(RuntimeError), no_waiting():
        value.item()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_in_bf16_sampler_and_trainer_agree_as_far_as_bf16_does(family):
    sampler = sampler_on("cuda", tiny_model(family).bfloat16())
    rollout = sampler.generate(prompts_of((4, 9)), 16, Sampling(0.8, max_new_tokens=12))
    packed = pack_rows(rollout, [(g, i) for g in range(2) for i in range(16)])
    with torch.no_grad():
        plain = tiny_model(family).bfloat16().float().cuda()
        head = measure_head(plain)
        trained = response_logprobs(sampler.model, head, packed, 0.8)
        exact = response_logprobs(plain, head, packed, 0.8)
    mine = (rollout.logprobs.flatten(0, 1)[:, : exact.shape[1]] - exact).abs()
    assert mine.mean() <= 4 * (trained - exact).abs().mean() + 0.01

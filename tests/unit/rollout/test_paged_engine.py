"""Blocks of steps that the host reads once, as on CUDA, run on the CPU: what they must not change."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import tiny_model
from tiny_sampler import LIMITS, prompts_of, sampler_for, watched_seats

from gspo.kernels import segment_attention
from gspo.rollout import cuda_graph_tables as tables
from gspo.rollout import slot_attention as decode_attention
from gspo.rollout.cuda_graph_tables import Tables, _shared_reads
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.kv_pages import Layer, Plan
from gspo.rollout.paged_engine import PACES, PagedGeneration
from gspo.rollout.sampler import Sampler
from gspo.rollout.slots import Slots
from gspo.types import Prompt


def sampled(model, steps, monkeypatch, sampling=None, limits=LIMITS, **options):
    """Twelve answers, as blocks of `steps` have them, or (0) as the CPU does."""
    with monkeypatch.context() as patch:
        if steps:
            patch.setitem(PACES, "cpu", replace(PACES["cuda"], steps=steps))
        sampler = sampler_for(model, **{"max_slots": 5, "page": 4, **options})
        sampler.end_ids = set(range(1, 8))
        return sampler.generate(
            prompts_of((3, 11, 1, 7)), 3, sampling or Sampling(1.2, max_new_tokens=14), limits=limits
        )


def assert_same(mine, plain):
    assert mine.tokens.equal(plain.tokens) and mine.lengths.equal(plain.lengths)
    assert mine.finished.equal(plain.finished) and mine.texts == plain.texts
    for x, y in ((mine.logprobs, plain.logprobs), (mine.entropy, plain.entropy)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gemma2",
        "deepseek_v3",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("qwen3", "mistral", "gpt_neox")),
    ],
)
def test_blocks_give_the_tokens_of_single_steps(family, monkeypatch):
    """Windows, soft caps, grouped heads, wide keys; slots are refilled between blocks, and half of them stand still."""
    model, refills = tiny_model(family), []
    plain = sampled(model, 0, monkeypatch)
    for steps in (1, 3, 8):
        with watched_seats(refills):
            assert_same(sampled(model, steps, monkeypatch), plain)
    assert max(refills[1:]) > 0, "no response began while others were under way"
    assert plain.finished.any() and (plain.lengths == LIMITS).any()


@pytest.mark.parametrize(
    "options",
    [
        {"max_slots": 1},
        *(pytest.param(x, marks=pytest.mark.slow) for x in ({"max_slots": 12, "page": 64}, {"page": 5})),
    ],
    ids=str,
)
def test_slots_and_pages_change_no_sample(options, monkeypatch):
    model = tiny_model("gemma2")
    plain = sampled(model, 0, monkeypatch, Sampling(0.0, max_new_tokens=14))
    assert_same(sampled(model, 4, monkeypatch, Sampling(0.0, max_new_tokens=14), **options), plain)


def test_slots_after_the_last_response_idle(monkeypatch):
    """Steps of 4, 8 and 16 slots with fewer answers in them, on pages that are all taken but one."""
    monkeypatch.setattr(tables, "SMALLEST_STEP", 4)
    counts, count = [], Tables.count
    monkeypatch.setattr(Tables, "count", lambda t: counts.append((count(t), len(t.slots))) or count(t))
    model, limits = tiny_model("llama"), torch.arange(1, 13).view(4, 3)
    options = {"sampling": Sampling(1.5, max_new_tokens=12), "limits": limits, "max_slots": 12}
    plain = sampled(model, 0, monkeypatch, **options)
    assert_same(sampled(model, 2, monkeypatch, **options), plain)
    assert {size for size, _ in counts} == {12, 6} and any(size > used for size, used in counts)


def test_prompts_with_more_responses_than_read_their_pages_together(monkeypatch):
    monkeypatch.setattr(tables, "READ_TOGETHER", 2)
    model = tiny_model("mistral")
    assert_same(sampled(model, 3, monkeypatch), sampled(model, 0, monkeypatch))


def test_stop_strings_trim_what_a_block_has_drawn_after_them(embedded_model, tokenizer, monkeypatch):
    texts = ["Solve: x + 5 = 12", "解方程：3x - 4 = 20"]
    prompts = [
        Prompt(i, tuple(tokenizer(f"<|user|>{t}<|assistant|>")["input_ids"]), t, "", "") for i, t in enumerate(texts)
    ]
    rollouts = []
    for steps in (0, 8):
        with monkeypatch.context() as patch:
            if steps:
                patch.setitem(PACES, "cpu", replace(PACES["cuda"], steps=steps))
            sampler = Sampler(embedded_model, tokenizer, torch.device("cpu"), max_slots=7, seed=3)
            rollouts.append(sampler.generate(prompts, 6, Sampling(0.9, max_new_tokens=32, stop=("= 7", "案", "so"))))
    plain, mine = rollouts
    assert_same(mine, plain)
    assert len(plain.lengths.unique()) > 2 and plain.finished.any()


@pytest.mark.parametrize("page", [2, 8])
def test_pages_stay_within_the_budget_and_are_freed_with_their_owner(page, monkeypatch):
    model, held, load = tiny_model("llama"), [], Tables.load
    token = 2 * 2 * (8 + 8) * 4  # layers x KV heads x (key + value) x float32

    def watched(t, *a, spare_row):
        load(t, *a, spare_row=spare_row)
        if spare_row != 12:  # the check of the model
            return
        held.append(t.slots.prompts.bytes + t.slots.responses.bytes)
        assert {g for g in t.slots.prompts.owner.tolist() if g >= 0} == set(t.slots.sizes)
        assert set(t.slots.responses.owner.tolist()) - {-1} == set(range(len(t.slots)))

    monkeypatch.setattr(Tables, "load", watched)
    sampled(model, 3, monkeypatch, max_slots="auto", kv_memory_gib=100 * token / 2**30, page=page)
    assert max(held) == min(held) <= 100 * token


def test_prompts_are_computed_in_batches_while_others_decode(monkeypatch):
    """Every response stands still meanwhile: so not before an eighth of sixteen slots is free, but for the last."""
    model, short = tiny_model("llama"), []
    prompts, limits = prompts_of((3, 5, 4, 9, 2, 6) * 5), torch.arange(60).view(30, 2) * 7 % 13 + 1
    prefill = PagedGeneration._prefill

    def watched(generation, numbers):
        under_way = len(generation.slots)
        room = generation.max_slots - under_way - len(generation.waiting_rows)
        rest = len(generation.queue) + len(numbers)
        short.append((under_way, room, rest))
        return prefill(generation, numbers)

    monkeypatch.setattr(PagedGeneration, "_prefill", watched)
    rollouts = []
    for share in (0.0, 1 / 8, 1.0):
        with monkeypatch.context() as patch:
            patch.setitem(PACES, "cpu", replace(PACES["cuda"], steps=2, prefill_ahead=1, refill_share=share))
            short.clear()
            sampler = sampler_for(model, max_slots=16, page=4)
            rollouts.append(sampler.generate(prompts, 2, Sampling(1.2, max_new_tokens=13), limits=limits))
        beside = [(room, rest) for under_way, room, rest in short if under_way]
        assert all(room >= share * 16 or 2 * rest <= room for room, rest in beside), beside
        assert (share == 0.0) == any(room == 1 for room, _ in beside), "else this test shows nothing"
    for mine in rollouts[1:]:
        assert_same(mine, rollouts[0])


# ---- the tables ----


def test_slots_that_read_together_by_hand():
    """Slots 0, 2, 3 answer the first prompt, 1 the second, 4 stands still; two at a time."""
    prompt, members = _shared_reads(np.array([0, 1, 0, 0, 2]), 2, 5)
    assert prompt.tolist() == [0, 0, 1, 2, 2]
    assert members.tolist() == [[0, 2], [3, -1], [1, -1], [4, -1], [-1, -1]]


def test_steps_have_few_sizes():
    assert tables.step_sizes(1024) == [1024, 768, 512, 384, 256, 128, 64, 32, 16, 8]
    assert tables.step_sizes(40) == [40, 20, 10] and tables.step_sizes(5) == [5]


def test_tables_by_hand():
    """Prompts of 3 and 5 tokens on pages of 4; answers of 2 and 4 tokens on pages of 2, which may grow by 3 and 1."""
    slots = Slots({0: Layer(1, 2, 2, torch.float32)}, Plan(4, 4, 12, page=2, prompt_page=4), torch.device("cpu"))
    slots.prefill([7, 3], [(1, 2, 3), (1, 2, 3, 4, 5)])
    slots.seat([30, 70], [3, 7])
    slots.reserve(np.array([2, 4]))
    slots.length = np.array([2, 4])
    t = Tables(slots, 4, 2, longest_prompt=5, longest_response=7)
    t.load(4, np.array([5, 5]), spare_row=99)
    assert (
        t.rows.tolist() == [30, 70, 99, 99] and t.lengths.tolist() == [3, 5, 1, 1] and t.sizes.tolist() == [5, 3, 0, 0]
    )
    assert t.response_pages.tolist() == [[0, 3, 4], [1, 2, 5], [6, 6, 6], [6, 6, 6]], "page 6 is the first that is free"
    assert t.prompt_sizes.tolist() == [5, 3, 0, 0] and t.prompt_pages[:2].tolist() == [[1, 2], [0, 0]]
    assert t.members.tolist() == [[0, -1], [1, -1], [2, 3], [-1, -1]]
    rows, lengths = t.read()
    assert rows.tolist() == [30, 70] and lengths.tolist() == [2, 4]


# ---- prompts ----


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_prompts_by_a_varlen_backend_are_the_same(family, monkeypatch):
    """As on CUDA in half precision, by the formulas that the backends there are measured by."""
    model = tiny_model(family)
    plain = sampled(model, 0, monkeypatch)
    monkeypatch.setattr(decode_attention, "backend_for", lambda q, k, v, softcap: segment_attention.Plain())
    assert_same(sampled(model, 0, monkeypatch), plain)


def test_pages_are_freed_as_soon_as_a_generation_ends(monkeypatch):
    """No reference cycle, which would wait for the garbage collector."""
    made, begin = [], Slots.__init__
    monkeypatch.setattr(Slots, "__init__", lambda slots, *a: begin(slots, *a) or made.append(weakref.ref(slots)))
    gc.disable()
    try:
        sampled(tiny_model("llama"), 3, monkeypatch)
        assert len(made) == 2 and all(ref() is None for ref in made)
    finally:
        gc.enable()

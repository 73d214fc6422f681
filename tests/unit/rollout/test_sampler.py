"""The sampler against plain transformers, and what a sample may not depend on."""

import pytest
import torch
from architectures import FAMILIES, tiny_model
from repository import PROGRAM_ENV
from tiny_sampler import Tokens, prompts_of, sampler_for, watched_seats
from transformers import GenerationConfig

from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.packing.logprobs import response_logprobs
from gspo.packing.pack import pack_rows
from gspo.packing.probe_head import measure_head
from gspo.rollout import slot_attention as decode_attention
from gspo.rollout.draw_tokens import Sampling, choose, sample_keys, uniforms
from gspo.rollout.kv_budget import plan_slots, prompt_page_size, response_page_size
from gspo.rollout.kv_pages import Layer, Plan, pages_for
from gspo.rollout.paged_engine import PagedGeneration
from gspo.rollout.sampler import EVAL, Sampler
from gspo.rollout.slots import Slots
from gspo.rollout.stop_strings import StopStrings
from gspo.types import Prompt


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_log_probs_equal_plain_transformers(family, monkeypatch):
    """Every next token is the arg max of an unpadded, uncached forward over all that came before.

    Five slots for twelve answers of different lengths, on pages of four tokens: slots are refilled half-way. Prompts
    attend to themselves four tokens at a time.
    """
    monkeypatch.setattr(decode_attention, "QUERIES", 4)
    model, refills, n = tiny_model(family), [], 3
    limits = torch.tensor([[10, 1, 7], [2, 10, 4], [10, 3, 9], [5, 10, 1]])
    sampling = Sampling(temperature=0.0, max_new_tokens=10)
    sampler = sampler_for(model, max_slots=5, page=4)
    with watched_seats(refills):
        rollout = sampler.generate(prompts_of((3, 11, 1, 7)), n, sampling, limits=limits)
    assert max(refills[1:]) > 0, "no response began while others were under way"
    for g, prompt in enumerate(rollout.prompts):
        length = int(rollout.lengths[g].max())
        i = int(rollout.lengths[g].argmax())
        answer = rollout.tokens[g, i, :length].tolist()
        logits = model(input_ids=torch.tensor([[*prompt.ids, *answer]])).logits[0, len(prompt.ids) - 1 : -1].float()
        assert logits.argmax(-1).tolist() == answer
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        for k, m in enumerate(rollout.lengths[g].tolist()):
            assert rollout.tokens[g, k, :m].tolist() == answer[:m]
            assert m == limits[g, k] or answer[m - 1] == 1
            torch.testing.assert_close(rollout.logprobs[g, k, :m], expected[:m], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_sampler_and_trainer_agree_on_log_probs(family):
    model = tiny_model(family)
    rollout = sampler_for(model).generate(prompts_of((4, 9)), 5, Sampling(temperature=0.8, max_new_tokens=12))
    packed = pack_rows(rollout, [(g, i) for g in range(2) for i in range(5)])
    logprobs = response_logprobs(model, measure_head(model), packed, 0.8)
    torch.testing.assert_close(rollout.logprobs.flatten(0, 1), logprobs, rtol=1e-4, atol=1e-4)
    row = rollout.tokens[0, 0, : rollout.lengths[0, 0]]
    ids = torch.tensor([[*rollout.prompts[0].ids, *row.tolist()]])
    logp = (model(input_ids=ids).logits[0, len(rollout.prompts[0].ids) - 1 : -1] / 0.8).log_softmax(-1)
    torch.testing.assert_close(rollout.entropy[0, 0, : len(row)], -(logp.exp() * logp).sum(-1), rtol=1e-4, atol=1e-4)
    assert rollout.lengths.unique().numel() > 1, "lengths should differ, or the test says little"


@pytest.mark.usefixtures("kernels")
def test_a_sample_depends_on_nothing_but_its_key(embedded_model, tokenizer):
    """Batch mates, slots, order: the same answers, token for token. Ranks: test_world.py."""
    texts = ["Solve: x + 5 = 12", "解方程：3x - 4 = 20", "Solve for x: 40 - x = 7", "求 x：x / 3 + 10 = 7"]
    encode = lambda t: tuple(tokenizer(f"<|user|>{t}<|assistant|>")["input_ids"])  # noqa: E731
    prompts = [Prompt(i, encode(t), t, "", "") for i, t in enumerate(texts)]
    sampling = Sampling(0.9, max_new_tokens=32)
    make = lambda slots: Sampler(embedded_model, tokenizer, torch.device("cpu"), max_slots=slots, seed=3)  # noqa: E731

    def answers(slots, prompts, n=6, step=2, **options):
        rollout = make(slots).generate(prompts, n, sampling, step=step, **options)
        groups = zip(rollout.tokens.tolist(), rollout.lengths.tolist(), strict=True)
        return [[ids[:length] for ids, length in zip(*group, strict=True)] for group in groups]

    whole = answers(256, prompts)
    assert answers(5, prompts) == whole, "slots"
    assert answers(12, prompts[::-1])[::-1] == whole, "order"
    assert answers(256, [prompts[2]]) == [whole[2]], "batch mates"
    assert answers(256, prompts, n=4) == [group[:4] for group in whole]
    assert answers(256, prompts, step=3) != whole != answers(256, prompts, purpose=EVAL)


def test_responses_end_at_the_first_end_token_and_are_cut_off_at_the_limit():
    model = tiny_model("llama")
    rollout = sampler_for(model).generate(prompts_of((3, 5)), 64, Sampling(1.5, max_new_tokens=20))
    for answer, length, finished in zip(
        rollout.tokens.flatten(0, 1), rollout.lengths.flatten(), rollout.finished.flatten(), strict=True
    ):
        body = answer[: int(length)].tolist()
        assert 1 not in body[:-1] and (body[-1] == 1) == bool(finished)
        assert finished or length == 20
        assert not answer[int(length) :].any()
    assert 0 < rollout.finished.float().mean() < 1


def test_first_tokens_follow_the_softmax_at_the_temperature():
    """Chi-square over 20,000 samples of the first token of one prompt."""
    model = tiny_model("llama")
    n, prompt = 20_000, prompts_of((6,))[0]
    logits = model(input_ids=torch.tensor([prompt.ids])).logits[0, -1].detach().float()
    keys = sample_keys(0, 0, 0, torch.full((n,), prompt.id), torch.arange(n))
    tokens, _, _ = choose(logits.expand(n, -1), uniforms(keys, 0), Sampling(0.8))
    rollout = sampler_for(model).generate([prompt], 500, Sampling(0.8, max_new_tokens=1))
    assert rollout.tokens[0, :, 0].equal(tokens[:500])
    p = (logits / 0.8).softmax(-1).double()
    common = p * n >= 5
    observed = torch.bincount(tokens, minlength=97).double()
    seen = torch.cat([observed[common], observed[~common].sum()[None]])
    wanted = torch.cat([p[common] * n, (p[~common] * n).sum()[None]])
    chi2, dof = float(((seen - wanted) ** 2 / wanted.clamp_min(1e-9)).sum()), len(seen) - 1
    assert chi2 < dof + 4 * (2 * dof) ** 0.5


def test_on_group_is_called_once_a_group_with_its_texts_when_its_last_response_ends(monkeypatch):
    """... before the longer groups have ended."""
    sampler, called, ended, decoded, step = sampler_for(tiny_model("llama")), {}, {}, [0], Slots.step
    monkeypatch.setattr(Slots, "step", lambda slots: decoded.__setitem__(0, decoded[0] + 1) or step(slots))

    def on_group(place, prompt, texts, reasons):
        assert place not in called
        called[place] = (prompt.id, texts, decoded[0])
        ended[place] = reasons

    prompts, limits = prompts_of((3, 9, 5, 7, 4)), torch.tensor([[30], [1], [40], [12], [40]]).expand(-1, 3)
    rollout = sampler.generate(prompts, 3, Sampling(1.5, max_new_tokens=40), on_group=on_group, limits=limits)
    assert {place: texts for place, (_, texts, _) in called.items()} == dict(enumerate(rollout.texts))
    assert all(rollout.prompts[place].id == id for place, (id, _, _) in called.items())
    assert ended == dict(enumerate(rollout.finish_reasons))
    longest = rollout.lengths.amax(1)
    assert [called[place][2] for place in range(5)] == (longest - 1).tolist(), "called at the step of its last token"
    assert len(longest.unique()) > 2, "lengths should differ, or the test says little"


def test_on_group_is_called_for_a_ranks_own_prompts_only_by_their_place_in_its_rollout():
    """Two ranks that share a tensor-parallel model sample all prompts together."""
    sampler, called = sampler_for(tiny_model("llama"), tp=2), {}
    world = World(1, 2, torch.device("cpu"), None)
    places, rollout = sampler.generate_share(
        prompts_of((3, 9, 5, 7, 4)), 2, Sampling(1.5, max_new_tokens=8), world,
        on_group=lambda place, prompt, texts, reasons: called.update({place: (prompt, texts)}),
    )  # fmt: skip
    assert places == [1, 3] and called == dict(enumerate(zip(rollout.prompts, rollout.texts, strict=True)))


@pytest.mark.usefixtures("kernels")
def test_slots_pages_and_memory_change_no_sample(tokenizer):
    """Gemma 2, windows and soft caps: any number of slots, size of page, and budget, the same tokens."""
    model, prompts, sampling = tiny_model("gemma2"), prompts_of((9, 1, 14, 4)), Sampling(1.2, max_new_tokens=14)
    limits = torch.tensor([[14, 3, 9, 14], [1, 14, 14, 2], [14, 14, 1, 6], [8, 14, 5, 14]])
    make = lambda **options: sampler_for(model, **options).generate(prompts, 4, sampling, limits=limits)  # noqa: E731
    whole = make()
    token = sum(layer.token_bytes for layer in sampler_for(model).engine.layout.values())
    for options in (
        {"max_slots": 1},
        {"max_slots": 3, "page": 2},
        {"max_slots": "auto", "page": 5},
        {"kv_memory_gib": 40 * token / 2**30, "page": 4},
    ):
        other = make(**options)
        assert other.tokens.equal(whole.tokens) and other.lengths.equal(whole.lengths), options
        torch.testing.assert_close(other.logprobs, whole.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("page", [2, 8])
def test_keys_and_values_stay_within_their_budget_and_are_freed_with_their_owner(monkeypatch, page):
    """Bytes of all pages, and those in use at every step: no more than the prompts and answers under way hold."""
    model, held = tiny_model("llama"), []
    token = 2 * 2 * (8 + 8) * 4  # layers x KV heads x (key + value) x float32
    budget, prompts = 100 * token, prompts_of((3, 11, 7, 5, 20, 2))
    limits = torch.tensor([[9, 2], [4, 9], [1, 1], [9, 9], [3, 5], [9, 1]])
    sampler = sampler_for(model, max_slots="auto", kv_memory_gib=budget / 2**30, page=page)
    step = Slots.step

    def watched(slots):
        out = step(slots)
        held.append(slots.prompts.bytes + slots.responses.bytes)
        assert {g for g in slots.prompts.owner.tolist() if g >= 0} == set(slots.sizes)
        assert (slots.responses.owner >= 0).sum() == sum(pages_for(int(n), page) for n in slots.length)
        return out

    monkeypatch.setattr(Slots, "step", watched)
    rollout = sampler.generate(prompts, 2, Sampling(1.0, max_new_tokens=9), limits=limits)
    assert (rollout.lengths == limits).all() or rollout.finished.any()
    assert max(held) == min(held) <= budget and max(held) > 0.5 * budget


def test_the_most_slots_that_fit_are_planned_and_none_is_the_users_mistake():
    """64 bytes a token, pages of 4: prompts of 10 and 6 tokens take 3 and 2 pages, an answer of 9 tokens 2."""
    layout = {0: Layer(heads=2, key_dim=4, value_dim=4, dtype=torch.float32)}
    plan = lambda pages, most=99: plan_slots(layout, [6, 10], 2, 9, most, pages * 4 * 64, 4)  # noqa: E731
    assert plan(5) == plan(6) == Plan(1, 3, 2, 4, 4)
    assert plan(7) == plan(10) == Plan(2, 3, 4, 4, 4)
    assert plan(11) == Plan(3, 5, 6, 4, 4), "a third slot answers the second prompt"
    assert plan(99) == Plan(4, 5, 8, 4, 4) and plan(99, most=3) == Plan(3, 5, 6, 4, 4)
    with pytest.raises(UserError, match=r"rollout.kv_memory_gib.*9 tokens.*10.*max_new_tokens"):
        plan(4)


@pytest.mark.parametrize(
    ("sizes", "page"), [([512] * 3, 512), ([500, 510], 512), ([51, 60], 64), ([256, 120], 128), ([40, 500], 128)]
)
def test_pages_of_prompts_are_as_large_as_their_lengths_let_them(sizes, page):
    assert prompt_page_size(sizes, 64) == page


def test_short_responses_have_small_pages_while_their_prompts_have_large_ones():
    assert [response_page_size(longest) for longest in (1, 14, 17, 33, 64, 65, 4096)] == [16, 16, 32, 64, 64, 64, 64]
    assert [prompt_page_size([size] * 3, 16) for size in (20, 512)] == [32, 512]


@pytest.mark.slow
def test_resident_memory_grows_by_no_more_than_the_budget(run_program):
    """A process whose keys and values dwarf everything else: 64 KiB a token, 1,536 tokens in 96 MiB."""
    done = run_program("tests/programs/kv_memory.py", 96, env=PROGRAM_ENV)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, pages = map(float, done.stdout.splitlines()[-1].split())
    assert 0.5 * 96 < grown < 96 + 32 and pages <= 96


# ---- how answers end ----


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(embedded_model, tokenizer):
    """Against cutting plain samples at the first token whose text completes one."""
    texts = ["Solve: x + 5 = 12", "解方程：3x - 4 = 20", "Solve for x: 40 - x = 7", "求 x：x / 3 + 10 = 7"]
    prompts = [
        Prompt(i, tuple(tokenizer(f"<|user|>{t}<|assistant|>")["input_ids"]), t, "", "") for i, t in enumerate(texts)
    ]
    stops = ("= 7", "案", "so")
    sampler = Sampler(embedded_model, tokenizer, torch.device("cpu"), max_slots=7, seed=3)
    plain = sampler.generate(prompts, 6, Sampling(0.9, max_new_tokens=32))
    cut = sampler.generate(prompts, 6, Sampling(0.9, max_new_tokens=32, stop=stops))
    stopped = 0
    for g in range(4):
        for i in range(6):
            ids = plain.tokens[g, i, : plain.lengths[g, i]].tolist()
            decoded = [tokenizer.decode(ids[: k + 1]) for k in range(len(ids))]
            ends = [k + 1 for k, text in enumerate(decoded) if any(stop in text for stop in stops)]
            expected = ids[: ends[0]] if ends else ids
            assert cut.tokens[g, i, : cut.lengths[g, i]].tolist() == expected
            assert bool(cut.finished[g, i]) == (bool(ends) or bool(plain.finished[g, i]))
            assert cut.finish_reasons[g][i] == ("stop" if cut.finished[g, i] else "length")
            stopped += bool(ends) and ends[0] < len(ids)
    assert 3 < stopped < 24


def test_text_is_decoded_only_where_the_last_character_of_a_stop_string_appears(tokenizer):
    stop, decoded_sizes = StopStrings(tokenizer, ("12",), 300, torch.device("cpu")), []
    text = lambda ids: decoded_sizes.append(len(ids)) or tokenizer.decode(ids)  # noqa: E731
    stop._text = text
    ids = tokenizer("x = 5 + 7, x = 12" + 40 * " y", add_special_tokens=False)["input_ids"]
    answers = torch.tensor([ids])
    row = torch.tensor([0])
    ends = [int(stop.ends(answers, row, torch.tensor([k]), torch.tensor([k + 1]))) for k in range(len(ids))]
    (end,) = [end for end in ends if end]
    assert ends.index(end) == end - 1 and tokenizer.decode(ids[:end]).endswith("12")
    assert len(decoded_sizes) < 4 and max(decoded_sizes) <= stop.tail
    assert int(stop.ends(answers, row, torch.tensor([2]), torch.tensor([len(ids)]))) == end, "many tokens at once"


def test_an_empty_stop_string_is_the_users_mistake(tokenizer):
    with pytest.raises(UserError, match=r"rollout.stop.*empty"):
        StopStrings(tokenizer, ("a", ""), 300, torch.device("cpu"))


def test_every_end_token_ends_a_response():
    model = tiny_model("llama")
    sampler = sampler_for(model)
    once = sampler.generate(prompts_of((3, 5)), 16, Sampling(1.5, max_new_tokens=12))
    other = int(once.tokens[0, 0, 2])  # some token that occurs
    model.generation_config = GenerationConfig(eos_token_id=[1, other], pad_token_id=0)
    twice = Sampler(model, Tokens(), torch.device("cpu")).generate(
        prompts_of((3, 5)), 16, Sampling(1.5, max_new_tokens=12)
    )
    for before, after, length in zip(
        once.tokens.flatten(0, 1).tolist(),
        twice.tokens.flatten(0, 1).tolist(),
        twice.lengths.flatten().tolist(),
        strict=True,
    ):
        assert after[:length] == before[:length]
        assert all(t not in (1, other) for t in after[: length - 1])
    assert int(twice.lengths[0, 0]) <= 3


@pytest.mark.parametrize("n", [1, 3])
def test_one_token_responses_need_no_slot(monkeypatch, n):
    monkeypatch.setattr(PagedGeneration, "_decode", lambda generation: pytest.fail("nothing to decode"))
    called = []
    rollout = sampler_for(tiny_model("qwen2")).generate(
        prompts_of((1, 6)),
        n,
        Sampling(1.0, max_new_tokens=1),
        on_group=lambda place, prompt, texts, reasons: called.append(place),
    )
    assert rollout.tokens.shape == (2, n, 1) and (rollout.lengths == 1).all() and sorted(called) == [0, 1]


def test_no_prompts_give_an_empty_rollout():
    rollout = sampler_for(tiny_model("llama")).generate([], 4, Sampling())
    assert rollout.tokens.shape == (0, 4, 0) and rollout.texts == []

"""Groups that are trees: where trunks branch, and that a branch is the response it would be by itself."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from architectures import tiny_model
from tiny_sampler import prompts_of, sampler_for

from gspo.config import Rollout as RolloutConfig
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.packing.micro_batches import group_tokens, micro_batches
from gspo.packing.pack import pack_rows
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.paged_engine import PACES, PagedEngine
from gspo.rollout.sampler import Sampler
from gspo.rollout.tree import Tree
from gspo.types import Prompt

TREE = Tree(trunks=2, branches=3, at="even", every=3)
SAMPLING = Sampling(1.2, max_new_tokens=14)
FIELDS = ("tokens", "lengths", "logprobs", "entropy", "finished", "copied", "prefilled")


def grown(model=None, sizes=(3, 11, 1, 7), tree=TREE, sampling=SAMPLING, ends=range(1, 8), **options):
    sampler = sampler_for(model or tiny_model("llama"), **options)
    sampler.end_ids = set(ends)
    return sampler.generate(prompts_of(sizes), tree.leaves, sampling, tree=tree)


def leaves(rollout):
    """[G][N] token lists."""
    groups = zip(rollout.tokens.tolist(), rollout.lengths.tolist(), strict=True)
    return [[ids[:length] for ids, length in zip(*group, strict=True)] for group in groups]


def assert_same(mine, other):
    assert leaves(mine) == leaves(other) and mine.texts == other.texts
    assert mine.finished.equal(other.finished) and mine.copied.equal(other.copied)
    for x, y in ((mine.logprobs, other.logprobs), (mine.entropy, other.entropy)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


# ---- places ----


@pytest.mark.parametrize(
    ("at", "every", "expected"),
    [
        ("entropy", 1.0, [[3, 4, 4], [1, 1, 2]]),  # sums .5 .8 1.5 3 3.4; 2.1 9
        ("entropy", 2.0, [[4, 6, 6], [1, 2, 2]]),
        ("even", 1.5, [[2, 3, 5], [2, 3, 3]]),
        ("most_uncertain", 1.0, [[1, 3, 4], [1, 2, 3]]),
        ("fractions", 1.0, [[2, 3, 5], [1, 2, 3]]),
    ],
)
def test_places_by_hand(at, every, expected):
    """A response's length where it has no such place. The first token's entropy does not count."""
    entropy = torch.tensor([[9.0, 0.5, 0.3, 0.7, 1.5, 0.4, 0.0], [9.0, 2.1, 6.9, 0.0, 0.0, 0.0, 0.0]])
    found = Tree(2, 3, at, every).places(entropy, torch.tensor([6, 3]))
    assert found.tolist() == expected


def test_places_of_a_beginning_do_not_depend_on_what_follows_it():
    """... but do where the tree looks ahead."""
    g = torch.Generator().manual_seed(0)
    entropy, short = torch.rand(200, 12, generator=g), torch.randint(1, 12, (200,), generator=g)
    whole = torch.full((200,), 12)
    for tree in (Tree(2, 3, "entropy", 0.7), Tree(2, 3, "even", 2.5)):
        early, late = tree.places(entropy, short), tree.places(entropy, whole)
        assert early.equal(torch.where(late < short[:, None], late, short[:, None])) and not tree.looks_ahead
    for at in ("most_uncertain", "fractions"):
        early, late = (Tree(2, 3, at).places(entropy, n) for n in (short, whole))
        assert not early.equal(torch.where(late < short[:, None], late, short[:, None])) and Tree(2, 3, at).looks_ahead


def test_a_tree_is_made_of_what_the_user_sets():
    assert Tree.of(RolloutConfig(n=8)) is None and Tree.of(RolloutConfig(n=8, trunks=8)) is None
    assert Tree.of(RolloutConfig(n=8, trunks=2)) == Tree(2, 3, "entropy", 1.0)
    assert Tree.of(RolloutConfig(n=6, trunks=3, branch_at="even", branch_every=5)) == Tree(3, 1, "even", 5)
    assert Tree.of(RolloutConfig(n=8, trunks=2), 20.0, 3.0).every == 0.75
    assert Tree.of(RolloutConfig(n=8, trunks=2, branch_at="even"), 20.0, 3.0).every == 5.0
    with pytest.raises(UserError, match=r"rollout.n = 8.*rollout.trunks = 3.*divisor"):
        Tree.of(RolloutConfig(n=8, trunks=3))


# ---- sampling ----


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_leaves_are_exact(family):
    """Trunks are the responses of a flat group; branches begin as their trunk does, and log-probs and entropies of
    all tokens are those of a plain forward."""
    model = tiny_model(family)
    rollout = grown(model)
    flat = sampler_for(model)
    flat.end_ids = set(range(1, 8))
    flat = flat.generate(prompts_of((3, 11, 1, 7)), 8, SAMPLING)
    mine, independent, branched = leaves(rollout), leaves(flat), 0
    for g, prompt in enumerate(rollout.prompts):
        for i, response in enumerate(mine[g]):
            trunk, place = mine[g][i - i % 4], int(rollout.copied[g, i])
            if i % 4 == 0:
                assert response == independent[g][i] and place == 0
            else:
                assert place == min(3 * (i % 4), len(trunk)) and response[:place] == trunk[:place]
                assert place < len(response) or response == trunk
                branched += response != trunk
            logits = model(input_ids=torch.tensor([[*prompt.ids, *response]])).logits[0, len(prompt.ids) - 1 : -1]
            logp = (logits.float() / 1.2).log_softmax(-1)
            expected = logp.gather(1, torch.tensor(response)[:, None])[:, 0]
            n = len(response)
            torch.testing.assert_close(rollout.logprobs[g, i, :n], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(rollout.entropy[g, i, :n], -(logp.exp() * logp).sum(1), rtol=1e-4, atol=1e-4)
            assert not rollout.logprobs[g, i, n:].any() and not rollout.tokens[g, i, n:].any()
            assert bool(rollout.finished[g, i]) == (response[-1] in range(1, 8)) and (
                rollout.finished[g, i] or n == SAMPLING.max_new_tokens
            )
    assert branched > 10 and rollout.finished.any() and not rollout.finished.all()


def test_a_branch_depends_on_nothing_but_its_key_and_its_trunk(monkeypatch):
    """Slots, pages, batch mates, order, and blocks of steps as on CUDA."""
    model = tiny_model("llama")
    whole = grown(model)
    assert_same(grown(model, max_slots=3, page=4), whole)
    sampler = sampler_for(model)
    sampler.end_ids = set(range(1, 8))
    prompts = prompts_of((3, 11, 1, 7))
    alone = sampler.generate([prompts[2], prompts[1]], 8, SAMPLING, tree=TREE)
    assert leaves(alone) == [leaves(whole)[2], leaves(whole)[1]]
    with monkeypatch.context() as patch:
        patch.setitem(PACES, "cpu", replace(PACES["cuda"], steps=4))
        assert_same(grown(model, max_slots=5), whole)
    other = sampler.generate(prompts, 8, SAMPLING, tree=TREE, step=1)
    assert leaves(other) != leaves(whole)


def computed_again(rollout):
    """For each trunk that has branches: its prompt's tokens, and its own up to the last place. [G][T]"""
    found = []
    for g, prompt in enumerate(rollout.prompts):
        places = [rollout.copied[g, t + 1 : t + 4] for t in (0, 4)]
        places = [x[x < rollout.lengths[g, t]].tolist() for t, x in zip((0, 4), places, strict=True)]
        found.append([len(prompt.ids) + max(x) if x else 0 for x in places])
    return found


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize(
    "family",
    ["llama", "gemma2", "deepseek_v3", *(pytest.param(x, marks=pytest.mark.slow) for x in ("qwen3", "mistral", "phi"))],
)
def test_branches_compute_nothing_that_their_trunk_has_computed(family, steps, monkeypatch):
    """Only the prompts of the groups are prefilled. Without memory to keep trunks, beginnings are prefilled, too,
    each once, and the leaves are the same."""
    if steps:
        monkeypatch.setitem(PACES, "cpu", replace(PACES["cuda"], steps=steps))
    model, tree = tiny_model(family), Tree(2, 3, "entropy", 0.1)  # every token is a place, a large entropy is several
    rollout, sizes = grown(model, tree=tree), [3, 11, 1, 7]
    assert rollout.prefilled.tolist() == sizes and (rollout.copied == 1).sum() > 8
    token_bytes = sum(layer.token_bytes for layer in sampler_for(model).engine.layout.values())
    again = grown(model, tree=tree, page=4, kv_memory_gib=44 * token_bytes / 2**30)
    assert_same(again, rollout)
    assert again.prefilled.tolist() == [a + sum(b) for a, b in zip(sizes, computed_again(again), strict=True)]


@pytest.fixture
def generations(monkeypatch):
    """What the engine has started, for a look behind."""
    found, start = [], PagedEngine.start
    monkeypatch.setattr(PagedEngine, "start", lambda *a: found.append(start(*a)) or found[-1])
    return found


TOKEN = 2 * 2 * (8 + 8) * 4  # bytes: layers x KV heads x (key + value) x float32


@pytest.mark.parametrize("tokens", [44, 100, 230, 280, 330, 400, 1000])
def test_trunks_are_kept_in_what_slots_and_pages_leave_of_the_memory(tokens, generations, capsys):
    """Some of them, where it holds no more; the leaves are the same, no slot is lost, and every page is freed."""
    model = tiny_model("llama")
    whole = grown(model)
    generations.clear()
    rollout = grown(model, page=4, kv_memory_gib=tokens * TOKEN / 2**30)
    assert_same(rollout, whole)
    trunks, branches = generations
    kept = trunks.requests.kept
    for generation in generations:
        pools = generation.slots.prompts, generation.slots.responses
        assert all(pool.free == pool.count for pool in pools) and not generation.slots.sizes
        assert sum(pool.bytes for pool in pools) + kept.bytes <= tokens * TOKEN
    expected = [len(p.ids) for p in rollout.prompts]
    for i, found in enumerate(computed_again(rollout)):
        expected[i] += sum(n for t, n in enumerate(found) if 2 * i + t not in kept.used)
    assert rollout.prefilled.tolist() == expected
    missing = sum(row not in kept.used for row in branches.requests.trunks)
    count = len(branches.requests.trunks)
    assert {44: missing == count, 1000: missing == 0}.get(tokens, True)
    said = f"no room for the keys and values of {missing} of {count} trunks"
    assert (said in capsys.readouterr().out) == (missing > 0)


def test_keys_of_trunks_are_kept_until_their_branches_have_ended(generations):
    """Each trunk's but of its last token, each prompt's once. The branches' steps run as the trunks' have."""
    rollout = grown()
    kept, branched = (x.requests.kept for x in generations)
    tokens = sum(len(p.ids) for p in rollout.prompts) + int((rollout.lengths[:, ::4] - 1).sum())
    assert kept is branched and kept.bytes == tokens * TOKEN
    kinds = [x.slots.prompts.attention_kinds_seen for x in generations]
    assert kinds[0] == kinds[1] == {(8**-0.5, None, None)}, "which the compiled layers ask for"
    held = weakref.ref(kept)
    generations.clear()
    del kept, branched
    gc.collect()
    assert held() is None


def test_packed_tokens_are_prompt_trunks_and_suffixes():
    """All tokens of trunks, and of a branch those that it does not share with its trunk or another branch."""
    rollout = grown(sizes=(5,))
    packed = pack_rows(rollout, [(0, i) for i in range(8)])
    beginnings = {tuple(response[: k + 1]) for response in leaves(rollout)[0] for k in range(len(response))}
    assert packed.ids.shape[1] == 5 + len(beginnings)
    sampled = int((rollout.lengths - rollout.copied).sum())
    assert len(beginnings) <= sampled < int(rollout.lengths.sum())
    assert group_tokens(rollout) == [5 + sampled]
    for budget, parts in ((5 + sampled, [[(0, i) for i in range(8)]]), (4 + sampled, None)):
        assert micro_batches(rollout, [0], budget=budget, max_rows=None, whole_groups=True) == parts


@pytest.mark.parametrize("truncation", [{"top_p": 0.8}, {"top_k": 5, "min_p": 0.05}], ids=str)
def test_truncation_holds_in_branches(truncation):
    rollout = grown(sampling=Sampling(1.5, max_new_tokens=10, **truncation))
    free = grown(sampling=Sampling(1.5, max_new_tokens=10))
    assert leaves(rollout) != leaves(free)
    suffix = rollout.mask & (torch.arange(rollout.tokens.shape[2]) >= rollout.copied[..., None])
    assert rollout.logprobs[suffix].min() > free.logprobs[free.mask].min()


@pytest.mark.parametrize("steps", [0, 8])
def test_a_stop_string_may_begin_in_the_trunk_and_end_in_the_branch(steps, embedded_model, tokenizer, monkeypatch):
    """Every leaf ends at the first token that completes one, and a branch is what it is without stop strings, cut."""
    if steps:
        monkeypatch.setitem(PACES, "cpu", replace(PACES["cuda"], steps=steps))
    texts = ["Solve: x + 5 = 12", "解方程：3x - 4 = 20", "Solve for x: 40 - x = 7"]
    prompts = [
        Prompt(i, tuple(tokenizer(f"<|user|>{t}<|assistant|>")["input_ids"]), t, "", "") for i, t in enumerate(texts)
    ]
    stops, tree = ("2 - 5 = ", "7 + 4", "+ 7 = ", "4 = 1"), Tree(2, 5, "even", 1.0)
    sampler = Sampler(embedded_model, tokenizer, torch.device("cpu"), max_slots=7, seed=3)
    plain = sampler.generate(prompts, 12, Sampling(1.1, max_new_tokens=32), tree=tree)
    cut = sampler.generate(prompts, 12, Sampling(1.1, max_new_tokens=32, stop=stops), tree=tree)
    across = 0
    for g, group in enumerate(leaves(cut)):
        for i, ids in enumerate(group):
            ends = [k for k in range(1, len(ids) + 1) if any(stop in tokenizer.decode(ids[:k]) for stop in stops)]
            assert ends in ([], [len(ids)]) and (bool(ends) <= bool(cut.finished[g, i]))
            place = int(cut.copied[g, i])
            if i % 6 and place < len(group[i - i % 6]):
                assert ids == leaves(plain)[g][i][: len(ids)]
                across += bool(ends) and not any(stop in tokenizer.decode(ids[place:]) for stop in stops)
    assert across > 0, "no stop string lay across a place"


def test_on_group_is_called_once_a_group_with_the_texts_of_all_its_leaves():
    sampler, called = sampler_for(tiny_model("llama")), {}
    sampler.end_ids = set(range(1, 40))  # some trunks end before they branch

    def on_group(place, prompt, texts, reasons):
        assert place not in called
        called[place] = (prompt, texts)

    rollout = sampler.generate(prompts_of((3, 11, 1, 7, 2)), 4, SAMPLING, tree=Tree(2, 1, "even", 2), on_group=on_group)
    assert called == dict(enumerate(zip(rollout.prompts, rollout.texts, strict=True)))
    whole = (rollout.copied[:, 1::2] == rollout.lengths[:, ::2]).all(1)
    assert whole.any() and not whole.all(), "groups with and without branches"


def test_ranks_sample_the_trees_that_one_rank_samples():
    """Also two ranks that share a tensor-parallel model, whose places are agreed upon."""
    one = grown(sizes=(3, 9, 5, 7, 4), ends=(1,))
    seen = []
    for tp, agree in ((1, None), (2, lambda x: seen.append(x.shape) or x)):
        for rank in range(2):
            sampler = sampler_for(tiny_model("llama"), tp=tp, agree=agree)
            world = World(rank, 2, torch.device("cpu"), None)
            places, mine = sampler.generate_share(prompts_of((3, 9, 5, 7, 4)), 8, SAMPLING, world, tree=TREE)
            assert_same(mine, one.select(places))
            assert mine.prefilled.equal(one.select(places).prefilled)
        assert ((10, 3) in seen) == (tp > 1), "trunks of five prompts, their places"


def test_no_prompts_give_an_empty_tree():
    assert sampler_for(tiny_model("llama")).generate([], 8, SAMPLING, tree=TREE).copied.shape == (0, 8)

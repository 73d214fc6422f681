"""Random numbers by key and the choice of a token, tested as distributions; the keys are fixed, so is every verdict."""

import math

import pytest
import torch
from chi_square import chi_square

from gspo import config
from gspo.rollout.draw_tokens import Sampling, choose, sample_keys, uniforms

COUNT = 100_000
START = {"seed": 3, "purpose": 1, "step": 7, "prompt": 11, "sample": 2}


def keys(count=1, **changed):
    """`count` equal keys; a component given as a tensor varies over them."""
    of = {**START, **changed}
    prompt, sample = (torch.as_tensor(of[name]).expand(count) for name in ("prompt", "sample"))
    return sample_keys(of["seed"], of["purpose"], of["step"], prompt, sample)


def many(position=0, count=COUNT, **changed):
    grid = torch.arange(count)
    return uniforms(keys(count, **{"prompt": grid // 8, "sample": grid % 8, **changed}), position)


# ---- uniforms ----


def by_hand(seed, purpose, step, prompt, sample, position):
    """The same number in plain Python: lowbias32, folded over the key, and 53 bits of two draws."""

    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    def fold(state, value):
        return mix((state * 0x9E3779B1 + mix(value) + 0x85EBCA6B) % 2**32)

    state = 0
    for value in (seed, purpose, step, prompt, sample):
        state = fold(state, value)
    return ((fold(state, 2 * position) << 21 ^ fold(state, 2 * position + 1)) + 0.5) / 2**53


@pytest.mark.parametrize("numbers", [(0, 0, 0, 0, 0, 0), (1, 2, 3, 4, 5, 6), (2**31, 2, 9999, 12345, 63, 1023)])
def test_the_number_behind_a_token_is_written_down(numbers):
    seed, purpose, step, prompt, sample, position = numbers
    key = sample_keys(seed, purpose, step, torch.tensor([prompt]), torch.tensor([sample]))
    assert uniforms(key, position).item() == by_hand(*numbers)


def test_lie_strictly_between_0_and_1_without_repeats():
    u = many()
    assert u.min() > 0 and u.max() < 1
    assert len(u.unique()) >= COUNT - 10  # 32-bit keys: one or two collisions among 1e5


def test_are_a_function_of_the_key_alone():
    grid = torch.arange(1000)
    together = uniforms(keys(1000, prompt=grid), 5)
    order = torch.randperm(1000)
    assert uniforms(keys(1000, prompt=grid[order]), 5).equal(together[order])
    assert uniforms(keys(1, prompt=grid[17]), 5).item() == together[17].item()


@pytest.mark.parametrize("name", START)
def test_every_component_of_the_key_matters(name):
    other = {"purpose": 2, "step": 8, "seed": 4}
    changed = {name: other[name]} if name in other else {name: torch.arange(COUNT) + 10 * COUNT}
    before, after = (
        many(prompt=torch.arange(COUNT), sample=0),
        many(**{"prompt": torch.arange(COUNT), "sample": 0, **changed}),
    )
    assert (before != after).all()
    assert abs(correlation(before, after)) < 4 / math.sqrt(COUNT)


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


@pytest.mark.parametrize("magnify", [1, 2**10, 2**25, 2**40], ids=["first bits", "from 10", "from 25", "from 40"])
def test_are_uniform_in_all_their_bits(magnify):
    u = many() * magnify % 1
    assert abs(u.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / COUNT)
    assert abs(u.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / COUNT)
    counts = torch.bincount((u * 256).long(), minlength=256)
    assert abs(chi_square(counts, torch.full((256,), COUNT / 256))) < 4


@pytest.mark.parametrize("neighbour", ["position", "sample", "prompt", "step", "seed"])
def test_neighbours_are_independent(neighbour):
    grid = torch.arange(COUNT)
    if neighbour == "position":
        a, b = many(position=0), many(position=1)
    elif neighbour in ("step", "seed"):
        a, b = many(), many(**{neighbour: START[neighbour] + 1})
    else:
        fixed = {"sample": 0, "prompt": 0} | {neighbour: grid}
        u = many(**fixed)
        a, b = u[:-1], u[1:]
    assert abs(correlation(a, b)) < 4 / math.sqrt(COUNT)
    cells = (a * 16).long() * 16 + (b * 16).long()
    assert abs(chi_square(torch.bincount(cells, minlength=256), torch.full((256,), len(a) / 256))) < 4


def test_one_sequence_draws_uniformly_along_its_positions():
    u = torch.cat([uniforms(keys(8, sample=torch.arange(8)), position) for position in range(2000)])
    assert abs(chi_square(torch.bincount((u * 64).long(), minlength=64), torch.full((64,), len(u) / 64))) < 4


# ---- the choice of a token ----

PROBS = torch.tensor([0.15, 0.4, 0.0, 0.3, 0.05, 0.1])  # 1, 3, 0, 5, 4 in falling order; 2 is impossible
LOGITS = PROBS.log()


def draw(logits, sampling, count=40_000):
    return choose(logits.expand(count, -1), many(count=count), sampling)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), {0, 1, 3, 4, 5}),
        (Sampling(temperature=0.5), {0, 1, 3, 4, 5}),
        (Sampling(temperature=2.0), {0, 1, 3, 4, 5}),
        (Sampling(top_k=2), {1, 3}),
        (Sampling(top_k=99), {0, 1, 3, 4, 5}),
        (Sampling(top_k=1), {1}),
        (Sampling(top_p=0.69), {1, 3}),
        (Sampling(top_p=0.71), {1, 3, 0}),  # 0.4 + 0.3 falls short of it
        (Sampling(top_p=1e-6), {1}),
        (Sampling(temperature=2.0, top_p=0.69), {1, 3, 0}),  # flatter: 0.29, 0.26, 0.18, ...
        (Sampling(temperature=0.5, top_p=0.85), {1, 3}),  # steeper: 0.56, 0.32, ...
        (Sampling(min_p=0.3), {1, 3, 0}),  # at least 0.12
        (Sampling(min_p=0.99), {1}),
        (Sampling(top_k=4, top_p=0.8), {1, 3, 0}),  # of 0.95: 0.42, 0.74, 0.89
        (Sampling(top_k=2, min_p=0.2), {1, 3}),
        (Sampling(temperature=0.9, top_k=3, top_p=0.95, min_p=0.1), {1, 3, 0}),
    ],
    ids=lambda x: " ".join(f"{k}={v}" for k, v in vars(x).items()) if isinstance(x, Sampling) else "",
)
def test_tokens_follow_the_softmax_over_what_is_kept(sampling, kept):
    tokens, logprobs, entropy = draw(LOGITS, sampling)
    tempered = PROBS ** (1 / sampling.temperature)
    allowed = tempered * torch.tensor([i in kept for i in range(6)])
    counts = torch.bincount(tokens, minlength=6)
    assert {i for i in range(6) if counts[i]} == kept
    assert abs(chi_square(counts, len(tokens) * allowed / allowed.sum())) < 4
    # what is reported knows the temperature and no truncation: it is what the trainer sees
    p = (tempered / tempered.sum()).double()
    torch.testing.assert_close(logprobs, p.log()[tokens].float())


@pytest.mark.parametrize("temperature", [0.5, 0.9, 3.0])
def test_logprobs_and_entropy_are_those_of_the_tempered_softmax(temperature):
    logits = 5 * torch.randn(64, 33)
    tokens, logprobs, entropy = choose(logits, many(count=64), Sampling(temperature=temperature, top_k=3, top_p=0.5))
    full = (logits.double() / temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs, full.gather(1, tokens[:, None])[:, 0].float())
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1).float())
    assert logprobs.dtype == entropy.dtype == torch.float32


def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1e9, -1e9], [0.0, -1e9, -1e9, -1e9]])
    _, _, entropy = choose(logits, torch.full((3,), 0.5), Sampling())
    torch.testing.assert_close(entropy, torch.tensor([math.log(4), math.log(2), 0.0]))


def test_an_impossible_token_does_not_spoil_the_entropy():
    _, _, entropy = draw(LOGITS, Sampling(), count=1)
    torch.testing.assert_close(entropy.item(), -sum(p * math.log(p) for p in (0.15, 0.4, 0.3, 0.05, 0.1)))


def test_greedy_takes_the_best_with_its_probability_at_temperature_1():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -1.0]])
    tokens, logprobs, _ = choose(logits, None, Sampling(temperature=0.9, top_k=5, top_p=0.3).greedy())
    assert tokens.tolist() == [1, 0]
    expected = [-math.log(1 + math.exp(-1) + math.exp(-2)), -math.log(1 + 2 * math.exp(-1))]
    torch.testing.assert_close(logprobs, torch.tensor(expected))


@pytest.mark.parametrize("u", [0.5 / 2**53, 1e-9, 0.5, 1 - 1e-9, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("possible", [[2], [0, 1], [1, 3], [3]])
def test_a_token_of_probability_zero_is_never_drawn(u, possible):
    logits = torch.full((1, 5), -torch.inf)
    logits[0, possible] = torch.tensor([0.3 * i for i in possible])
    tokens, logprobs, _ = choose(logits, torch.tensor([u], dtype=torch.float64), Sampling())
    assert tokens.item() in possible and logprobs.isfinite().all()


def test_a_token_ruled_out_is_not_drawn_at_the_ends_either():
    ends = torch.tensor([0.5 / 2**53, 1 - 2**-53], dtype=torch.float64)
    tokens, _, _ = choose(torch.tensor([[0.1, 5.0, 4.0, 0.2]] * 2), ends, Sampling(top_k=2))
    assert tokens.tolist() == [1, 2]


def test_one_very_likely_token_is_always_drawn():
    tokens, logprobs, entropy = draw(torch.tensor([-50.0, 150.0, 0.0]), Sampling())
    assert (tokens == 1).all() and (logprobs == 0).all() and (entropy.abs() < 1e-6).all()


def test_a_rare_token_is_drawn_as_rarely_as_it_should():
    rare = 1e-3
    tokens, _, _ = draw(torch.tensor([1 - rare, rare]).log(), Sampling(), count=COUNT)
    assert abs(int(tokens.sum()) - COUNT * rare) < 4 * math.sqrt(COUNT * rare)


def test_inverse_cdf_over_a_large_vocabulary():
    u = torch.tensor([0.0001, 0.25001, 0.5, 0.99999], dtype=torch.float64)
    tokens, _, _ = choose(torch.zeros(4, 150_000), u, Sampling())
    assert ((tokens - u * 150_000).abs() <= 1).all()


def test_half_precision_logits_are_read_in_float32():
    logits = torch.randn(16, 50).bfloat16()
    for half, single in zip(
        choose(logits, many(count=16), Sampling()), choose(logits.float(), many(count=16), Sampling()), strict=True
    ):
        assert half.equal(single)


def test_sampling_settings_come_from_the_rollout_section():
    cfg = config.Rollout(temperature=0.7, top_k=5, top_p=0.8, min_p=0.1, max_new_tokens=9)
    assert Sampling.of(cfg) == Sampling(temperature=0.7, top_k=5, top_p=0.8, min_p=0.1, max_new_tokens=9)
    assert Sampling.of(cfg).greedy() == Sampling(temperature=0.0, max_new_tokens=9)

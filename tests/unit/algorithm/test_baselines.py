"""The baselines of the table: closed forms, finite differences, and what they share with each other and with GSPO."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from reward_groups import COUNTS, LEVELS, G, N, a_batch, at_once

from gspo.algorithm.objective import ALGORITHMS, Counts, Groups, evaluate
from gspo.algorithm.pairs import preferences
from gspo.config import Objective

BETA = 0.3


def cfg(name, **settings):
    return Objective(algorithm=name, preference_beta=BETA, use_ranking_loss=False, **settings)


def a_batch_for(name):
    """A batch of rewards; for an algorithm with a critic, with advantages of tokens too."""
    logprobs, groups = a_batch()
    critic = ALGORITHMS[name].needs_critic
    return logprobs, replace(groups, advantages=torch.randn_like(logprobs)) if critic else groups


def mean(values):
    return sum(values) / len(values)


def advantages(name, r, lengths):
    """A_i of one group, from the papers' formulas, with loops."""
    if name == "rloo":
        return [r[i] - mean([r[j] for j in range(N) if j != i]) for i in range(N)]
    centred = [x - mean(r) for x in r]
    if name == "dr_grpo":
        return centred
    if name == "maxrl":
        return [x / mean(r) for x in centred]
    std = mean([x * x for x in centred]) ** 0.5
    return [x / (std + 1e-4) / length for x, length in zip(centred, lengths, strict=True)]


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo", "maxrl"])
def test_policy_gradients_by_hand(name):
    logprobs, groups = a_batch()
    expected = [
        [-a / (G * N) for a in advantages(name, groups.rewards[g].tolist(), groups.lengths[g].tolist())]
        for g in range(G)
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    c = evaluate(logprobs, groups, cfg(name), COUNTS).coefficients[..., 0]
    torch.testing.assert_close(c, expected, rtol=0, atol=1e-14)


def sigmoid(x):
    return float(torch.tensor(x, dtype=torch.float64).sigmoid())


def test_online_dpo_by_hand():
    """The best pushes the worst away; who stands between them is left alone, and so is a group of equals."""
    logprobs, groups = a_batch()
    c = evaluate(logprobs, groups, cfg("online_dpo"), COUNTS).coefficients[..., 0]
    expected = torch.zeros(G, N, dtype=torch.float64)
    for g in range(1, G):
        r = groups.rewards[g].tolist()
        w, k = r.index(max(r)), r.index(min(r))
        if r[w] - r[k] < 0.11:  # 0.1 against 0.0 is no pair at margin 0.1
            continue
        s = [BETA * float(logprobs[g, i] - groups.anchors[g, i]) for i in (w, k)]
        expected[g, k] = BETA * sigmoid(s[1] - s[0]) / G
        expected[g, w] = -expected[g, k]
    torch.testing.assert_close(c, expected, rtol=0, atol=1e-14)
    assert c[0].abs().max() == 0 and c[1:].abs().max() > 0


def test_online_dpo_of_two_is_gspo_of_two():
    logprobs = -10 * torch.rand(4, 2, 1, dtype=torch.float64)
    rewards = LEVELS[torch.tensor([[0, 3], [3, 2], [1, 1], [2, 3]])]
    groups = Groups(torch.zeros(4, 2, 1), rewards, preferences(rewards, 0.1), at_once(4, 2), torch.ones(4, 2))
    one, other = (evaluate(logprobs, groups, cfg(name), Counts(4, 1.0)).coefficients for name in ("online_dpo", "gspo"))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-15)


def test_online_dpo_within_the_margin_is_no_pair():
    logprobs, rewards = torch.zeros(1, 3, 1, dtype=torch.float64), torch.tensor([[0.5, 0.55, 0.6]])
    groups = Groups(logprobs, rewards, preferences(rewards, 0.1), at_once(1, 3), torch.ones(1, 3))
    assert evaluate(logprobs, groups, cfg("online_dpo"), Counts(1, 0.0)).coefficients.abs().max() == 0


def test_spin_by_hand():
    """The last, the gold text, against every sample; rewards play no part."""
    logprobs, groups = a_batch()
    c = evaluate(logprobs, groups, cfg("spin"), COUNTS).coefficients[..., 0]
    expected = torch.zeros(G, N, dtype=torch.float64)
    for g in range(G):
        s = [BETA * float(logprobs[g, i] - groups.anchors[g, i]) for i in range(N)]
        for i in range(N - 1):
            expected[g, i] = BETA * sigmoid(s[i] - s[-1]) / (G * (N - 1))
        expected[g, -1] = -expected[g, :-1].sum()
    torch.testing.assert_close(c, expected, rtol=0, atol=1e-14)
    other = replace(groups, rewards=1 - groups.rewards)
    torch.testing.assert_close(evaluate(logprobs, other, cfg("spin"), COUNTS).coefficients[..., 0], c, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_coefficients_equal_finite_differences(name):
    logprobs, groups = a_batch_for(name)
    eps, total = 1e-5, lambda x: float(sum(ALGORITHMS[name].loss(x, groups, cfg(name), COUNTS).values()))
    numeric = torch.zeros_like(logprobs)
    for g, i in product(range(G), range(N)):
        step = torch.zeros_like(logprobs)
        step[g, i] = eps
        numeric[g, i] = (total(logprobs + step) - total(logprobs - step)) / (2 * eps)
    torch.testing.assert_close(evaluate(logprobs, groups, cfg(name), COUNTS).coefficients, numeric, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", [a for a in ALGORITHMS if a != "spin"])
def test_permuting_responses_permutes_coefficients(name):
    logprobs, groups = a_batch_for(name)
    groups = replace(groups, rewards=groups.rewards + 1e-3 * torch.arange(N))  # no ties, which online_dpo may break
    order = torch.tensor([3, 0, 4, 1, 2])
    fields = {k: v[:, order] for k, v in vars(groups).items() if v is not None}
    moved = Groups(**{**fields, **{name: fields[name][:, :, order] for name in ("beats", "forks")}})
    torch.testing.assert_close(
        evaluate(logprobs[:, order], moved, cfg(name), COUNTS).coefficients,
        evaluate(logprobs, groups, cfg(name), COUNTS).coefficients[:, order],
    )


# maxrl's zero has a meaning, not right; ppo's advantages are a critic's
@pytest.mark.parametrize("name", [a for a in ALGORITHMS if a not in ("maxrl", "ppo")])
def test_a_constant_added_to_all_rewards_changes_nothing(name):
    logprobs, groups = a_batch()
    moved = replace(groups, rewards=groups.rewards * 0.5 + 0.3)
    base = replace(groups, rewards=groups.rewards * 0.5)
    torch.testing.assert_close(
        evaluate(logprobs, moved, cfg(name), COUNTS).coefficients,
        evaluate(logprobs, base, cfg(name), COUNTS).coefficients,
        atol=1e-12,
        rtol=0,
    )


@pytest.mark.parametrize("name", [a for a in ALGORITHMS if a not in ("grpo", "tempo", "spin", "ppo")])
def test_a_group_without_contrast_teaches_nothing(name):
    logprobs, groups = a_batch()  # group 0: five equal rewards
    assert evaluate(logprobs, groups, cfg(name), COUNTS).coefficients[0].abs().max() < 1e-15


def test_grpo_ignores_the_size_of_a_gap_and_rloo_does_not():
    logprobs, lengths = torch.zeros(2, 4, 1, dtype=torch.float64), torch.ones(2, 4)
    rewards = torch.tensor([[1.0, 0, 0, 0], [0.5, 0, 0, 0]], dtype=torch.float64)
    groups = Groups(logprobs, rewards, preferences(rewards, 0.1), at_once(2, 4), lengths)
    grpo = evaluate(logprobs, groups, cfg("grpo"), Counts(2, 3.0)).coefficients
    rloo = evaluate(logprobs, groups, cfg("rloo"), Counts(2, 3.0)).coefficients
    torch.testing.assert_close(grpo[0], grpo[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(rloo[0], 2 * rloo[1])


def test_rloo_is_dr_grpo_but_for_a_constant():
    logprobs, groups = a_batch()
    rloo, dr = (evaluate(logprobs, groups, cfg(name), COUNTS).coefficients for name in ("rloo", "dr_grpo"))
    torch.testing.assert_close(rloo, dr * N / (N - 1), rtol=1e-12, atol=1e-16)

"""The objective against closed forms, finite differences and identities, all in float64."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from reward_groups import COUNTS, G, N, a_batch, at_once

from gspo.algorithm.objective import (
    ALGORITHMS,
    Counts,
    Groups,
    evaluate,
    frozen_loss,
    gaps,
    gspo,
    kl_k3,
    kl_loss,
    pair_accuracy,
    preference_loss,
    ranking_loss,
)
from gspo.algorithm.pairs import preferences
from gspo.config import Objective


def by_hand(logprobs, groups, cfg, counts):
    """dL/dl from the closed forms, written with loops."""
    beta, out = cfg.preference_beta, torch.zeros(G, N, 1, dtype=torch.float64)
    for g in range(G):
        n = [1.0 if cfg.length_norm == "sum" else float(x) for x in groups.lengths[g]]
        s = [beta * float(logprobs[g, i] - groups.anchors[g, i]) / n[i] for i in range(N)]
        r, d = groups.rewards[g].tolist(), groups.beats[g].tolist()
        constant, own = N * (N - 1) / 2, max(1, sum(map(sum, d)))
        z = {"constant": constant, "batch": counts.pairs_per_group, "group": own, "sqrt": math.sqrt(constant * own)}
        for i, j in product(range(N), range(N)):
            if d[i][j]:
                w = 1.0 if cfg.pair_weight == "one" else r[i] - r[j]
                p = 1 / (1 + math.exp(s[i] - s[j]))
                out[g, j] += beta / (counts.groups * z[cfg.normalizer] * n[j]) * w * p
                out[g, i] -= beta / (counts.groups * z[cfg.normalizer] * n[i]) * w * p
        winners = [i for i in range(N) if any(d[i])]
        for i in winners if cfg.use_ranking_loss else []:
            total = math.exp(s[i]) + sum(math.exp(s[j]) for j in range(N) if d[i][j])
            for j in range(N):
                if d[i][j]:
                    q = math.exp(s[j]) / total
                    out[g, j] += cfg.ranking_coef * beta / (counts.groups * len(winners) * n[j]) * q
                    out[g, i] -= cfg.ranking_coef * beta / (counts.groups * len(winners) * n[i]) * q
    return out


SETTINGS = [
    Objective(normalizer=z, pair_weight=w, length_norm=norm, use_ranking_loss=rank, preference_beta=0.3)
    for z, w, norm, rank in product(
        ("constant", "batch", "group", "sqrt"), ("one", "gap"), ("sum", "mean"), (True, False)
    )
]


@pytest.mark.parametrize(
    "cfg", SETTINGS, ids=lambda c: f"{c.normalizer}-{c.pair_weight}-{c.length_norm}-{c.use_ranking_loss}"
)
def test_coefficients_equal_the_closed_form(cfg):
    logprobs, groups = a_batch()
    torch.testing.assert_close(
        evaluate(logprobs, groups, cfg, COUNTS).coefficients, by_hand(logprobs, groups, cfg, COUNTS), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("nll", [0.0, 0.5])
def test_coefficients_equal_finite_differences(nll):
    logprobs, groups = a_batch()
    cfg, eps = Objective(preference_beta=0.5, nll_coef=nll), 1e-5
    total = lambda x: sum(gspo(x, groups, cfg, COUNTS).values())  # noqa: E731
    numeric = torch.zeros_like(logprobs)
    for g, i in product(range(G), range(N)):
        up, down = logprobs.clone(), logprobs.clone()
        up[g, i] += eps
        down[g, i] -= eps
        numeric[g, i] = (total(up) - total(down)) / (2 * eps)
    torch.testing.assert_close(evaluate(logprobs, groups, cfg, COUNTS).coefficients, numeric, rtol=0, atol=1e-9)


def test_two_responses_are_the_seeds_formula():
    """-log sigma(beta (log pi(y_w) - log pi(y_l))) with anchor `none`."""
    logprobs = torch.tensor([[[-1.0, -2.0], [-3.0, -4.0]]], dtype=torch.float64)
    rewards = torch.tensor([[0.0, 1.0]], dtype=torch.float64)  # the second wins
    groups = Groups(torch.zeros_like(logprobs), rewards, preferences(rewards, 0.1), at_once(1, 2), 2 * torch.ones(1, 2))
    cfg = Objective(preference_beta=0.1, after_fork=1.0)
    loss = preference_loss(gaps(logprobs, groups, cfg), groups, cfg, Counts(1, 1.0))
    assert float(loss) == pytest.approx(-math.log(1 / (1 + math.exp(-0.1 * (-7.0 + 3.0)))), abs=1e-12)


def test_ranking_loss_by_hand():
    """Three distinct rewards: the top beats two, the middle one; Plackett-Luce over those."""
    s = torch.tensor([[0.2, -0.1, 0.4]], dtype=torch.float64)
    rewards = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    groups = Groups(torch.zeros(1, 3, 1), rewards, preferences(rewards, 0.1), at_once(1, 3), torch.ones(1, 3))
    top = math.log(math.exp(0.2) + math.exp(-0.1) + math.exp(0.4)) - 0.2
    middle = math.log(math.exp(-0.1) + math.exp(0.4)) + 0.1
    gap = s[:, :, None] - s[:, None, :]
    assert float(ranking_loss(gap, groups, Counts(1, 3.0))) == pytest.approx((top + middle) / 2, abs=1e-12)


def test_on_policy_gap_weights_give_rloo():
    """anchor `old`, gap weights, margin 0, constant Z: c is proportional to minus the leave-one-out advantage."""
    logprobs, groups = a_batch(margin=0.0)
    groups = replace(groups, anchors=logprobs)
    cfg = Objective(pair_weight="gap", margin=0.0, use_ranking_loss=False, normalizer="constant")
    c = evaluate(logprobs, groups, cfg, COUNTS).coefficients
    others = (groups.rewards.sum(1, keepdim=True) - groups.rewards) / (N - 1)
    advantage = groups.rewards - others
    scale = -cfg.preference_beta / (G * N)  # beta / (B Z) * (1/2) * (N - 1), Z = N (N - 1) / 2
    torch.testing.assert_close(c[..., 0], scale * advantage, rtol=0, atol=1e-14)


def test_binary_rewards_with_sqrt_give_grpo_up_to_a_constant():
    """Binary rewards, on-policy, Z = sqrt: c is proportional to the standardised reward in every group."""
    rewards = torch.tensor([[1.0, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.float64)
    logprobs = -torch.rand(G, N, 1, dtype=torch.float64)
    groups = Groups(logprobs, rewards, preferences(rewards, 0.1), at_once(G, N), torch.ones(G, N))
    c = evaluate(logprobs, groups, Objective(normalizer="sqrt", use_ranking_loss=False), COUNTS).coefficients
    standard = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True, correction=0)
    ratio = c[..., 0] / standard
    torch.testing.assert_close(ratio, ratio[0, 0].expand(G, N), rtol=1e-12, atol=0)
    assert float(ratio[0, 0]) < 0


@pytest.mark.parametrize("cfg", SETTINGS[:4], ids=str)
def test_coefficients_sum_to_zero_in_a_group_and_vanish_without_pairs(cfg):
    logprobs, groups = a_batch()
    c = evaluate(logprobs, groups, replace(cfg, length_norm="sum"), COUNTS).coefficients
    torch.testing.assert_close(c.sum((1, 2)), torch.zeros(G, dtype=torch.float64), rtol=0, atol=1e-15)
    assert c[0].abs().max() == 0 and c[1:].abs().max() > 0


def test_permuting_responses_permutes_coefficients():
    logprobs, groups = a_batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = Groups(
        groups.anchors[:, order],
        groups.rewards[:, order],
        groups.beats[:, order][:, :, order],
        groups.forks[:, order][:, :, order],
        groups.lengths[:, order],
    )
    cfg = Objective()
    torch.testing.assert_close(
        evaluate(logprobs[:, order], moved, cfg, COUNTS).coefficients,
        evaluate(logprobs, groups, cfg, COUNTS).coefficients[:, order],
    )


def test_a_constant_added_to_all_rewards_changes_nothing():
    logprobs, groups = a_batch()
    shifted = groups.rewards * 0.5 + 0.3
    same = replace(groups, rewards=groups.rewards * 0.5, beats=preferences(groups.rewards * 0.5, 0.04))
    more = replace(groups, rewards=shifted, beats=preferences(shifted, 0.04))
    cfg = Objective(pair_weight="gap")
    torch.testing.assert_close(
        evaluate(logprobs, same, cfg, COUNTS).coefficients,
        evaluate(logprobs, more, cfg, COUNTS).coefficients,
        rtol=1e-12,
        atol=0,
    )


def test_swapping_policy_and_anchor_flips_the_gaps():
    logprobs, groups = a_batch()
    swapped = gaps(groups.anchors, replace(groups, anchors=logprobs), Objective())
    torch.testing.assert_close(swapped, -gaps(logprobs, groups, Objective()))


def test_the_loss_of_parts_adds_up_to_the_loss_of_the_whole():
    logprobs, groups = a_batch()
    cfg = Objective(normalizer="batch", nll_coef=0.1)
    part = lambda rows: Groups(**{name: value[rows] for name, value in vars(groups).items() if value is not None})  # noqa: E731
    whole = sum(gspo(logprobs, groups, cfg, COUNTS).values())
    parts = sum(sum(gspo(logprobs[r], part(r), cfg, COUNTS).values()) for r in ([0], [1, 2]))
    torch.testing.assert_close(parts, whole, rtol=1e-14, atol=0)


def test_frozen_loss_has_the_coefficients_as_gradient_at_the_old_policy():
    old = -torch.rand(4, 6, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]
    coefs = torch.randn(4, 6, dtype=torch.float64) * mask
    now = old.clone().requires_grad_()
    frozen_loss(now, old, coefs, torch.ones_like(old), Objective()).backward()
    torch.testing.assert_close(now.grad, coefs)


def test_frozen_loss_stops_pushing_beyond_the_clip():
    old = torch.zeros(2, 1, dtype=torch.float64)
    now = torch.tensor([[math.log(1.5)], [math.log(0.5)]], dtype=torch.float64, requires_grad=True)
    weights = torch.ones(2, 1)
    frozen_loss(now, old, torch.tensor([[-1.0], [1.0]]), weights, Objective()).backward()
    assert now.grad.abs().max() == 0  # a winner already up by half, a loser already down by half
    now.grad = None
    frozen_loss(now, old, torch.tensor([[1.0], [-1.0]]), weights, Objective()).backward()
    torch.testing.assert_close(now.grad, torch.tensor([[1.5], [-0.5]], dtype=torch.float64))


def test_kl_loss_gradient_is_that_of_the_reverse_kl():
    """Over all V one-token answers weighted by pi: E[0.5 d^2] has the gradient of KL(pi || ref)."""
    logits, ref = (
        torch.randn(7, dtype=torch.float64, requires_grad=True),
        torch.randn(7, dtype=torch.float64).log_softmax(0),
    )
    logp = logits.log_softmax(0)
    exact = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[0]
    mask = torch.ones(1, 1, dtype=torch.bool)
    sampled = sum(
        float(logp[v].exp())
        * torch.autograd.grad(
            kl_loss(logp[v].view(1, 1), ref[v].view(1, 1), mask, 1, Counts(1, 0.0)), logits, retain_graph=True
        )[0]
        for v in range(7)
    )
    torch.testing.assert_close(sampled, exact, rtol=1e-10, atol=1e-12)


def test_k3_is_unbiased_and_never_negative():
    logp, ref = torch.randn(9, dtype=torch.float64).log_softmax(0), torch.randn(9, dtype=torch.float64).log_softmax(0)
    assert float(kl_k3(logp, ref).min()) >= 0
    exact = (logp.exp() * (logp - ref)).sum()
    torch.testing.assert_close((logp.exp() * kl_k3(logp, ref)).sum(), exact)


def test_on_truncated_samples_k3_misses_the_tail_and_is_at_most_the_kl_by_the_share_kept():
    """By enumeration: a policy truncated to its likeliest tokens, against references that moved anywhere, or in the
    tail only."""
    logp = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03], dtype=torch.float64).log()
    kept, z = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64), 0.9
    sampled = logp.exp() * kept / z
    tail_only = torch.tensor([0.4, 0.3, 0.2, 0.01, 0.09], dtype=torch.float64).log()
    for ref in (torch.randn(5, dtype=torch.float64).log_softmax(0), tail_only):
        kl = (logp.exp() * (logp - ref)).sum()
        seen = (sampled * kl_k3(logp, ref)).sum()
        assert -1e-12 < seen <= kl / z
    assert float(kl) > 0.1 and abs(float(seen)) < 1e-12, "what moved in the tail alone is not seen"


def test_pair_accuracy_counts_a_tie_as_half():
    beats = torch.zeros(1, 3, 3, dtype=torch.bool)
    beats[0, 0, 1] = beats[0, 0, 2] = beats[0, 1, 2] = True
    for s, right in (([[2.0, 2.0, 5.0]], 0.5), ([[3.0, 2.0, 1.0]], 3.0)):
        s = torch.tensor(s)
        assert pair_accuracy(s[:, :, None] - s[:, None, :], beats) == right


def test_a_rank_without_groups_has_its_share_of_nothing():
    empty = torch.zeros(0, 4, 0)
    square = torch.zeros(0, 4, 4, dtype=torch.long)
    groups = Groups(empty, torch.zeros(0, 4), square.bool(), square, torch.zeros(0, 4), advantages=empty)
    for name in ALGORITHMS:
        assert evaluate(empty, groups, Objective(algorithm=name), COUNTS).coefficients.shape == (0, 4, 0)

"""Values of branches: what TEMPO and `pair_weight: branch` make of a group's tree, and MaxRL beside them."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from gspo.algorithm.objective import ALGORITHMS, Counts, Groups, evaluate, pair_weights, prefix_values
from gspo.algorithm.pairs import forks, preferences
from gspo.config import Objective
from gspo.errors import UserError

# A tree: all but the last begin with 5; two of these go on with 6.
TOKENS = torch.tensor([[[5, 6, 7], [5, 6, 4], [5, 8, 0], [9, 0, 0]]])
LENGTHS = torch.tensor([[3, 3, 2, 1]])
REWARDS = torch.tensor([[1.0, 0.0, 0.2, 0.8]], dtype=torch.float64)


def a_tree(rewards=REWARDS):
    logprobs = -torch.arange(1.0, 13.0, dtype=torch.float64).view(1, 4, 3)
    logprobs *= torch.arange(3) < LENGTHS[..., None]
    apart = forks(TOKENS, LENGTHS)
    return logprobs, Groups(torch.zeros(1, 4, 3), rewards, preferences(rewards, 0.1), apart, LENGTHS)


def random_trees(count=3, n=6, width=7):
    """Groups of responses of a two-token vocabulary, which part early and late, among them some that are equal."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 3, (count, n, width), generator=g)
    lengths = torch.randint(1, width + 1, (count, n), generator=g)
    tokens[torch.arange(width) >= lengths[..., None]] = 0
    rewards = torch.rand(count, n, generator=g, dtype=torch.float64)
    logprobs = -torch.rand(count, n, width, generator=g, dtype=torch.float64) * (tokens > 0)
    return logprobs, Groups(
        torch.zeros_like(logprobs), rewards, preferences(rewards, 0.1), forks(tokens, lengths), lengths
    )


def coefficients(name, logprobs, groups, counts=None, **settings):
    return evaluate(
        logprobs, groups, Objective(algorithm=name, **settings), counts or Counts(len(logprobs), 4.0)
    ).coefficients


def test_prefix_values_by_hand():
    """The group has 2/4; behind 5 it is 1.2/3, behind 5 6 it is 1/2; a response's end is worth what it got."""
    _, groups = a_tree()
    expected = [[0.5, 0.4, 0.5, 1.0], [0.5, 0.4, 0.5, 0.0], [0.5, 0.4, 0.2, 0.2], [0.5, 0.8, 0.8, 0.8]]
    torch.testing.assert_close(prefix_values(groups), torch.tensor([expected], dtype=torch.float64))


def test_prefix_values_are_means_over_those_that_begin_alike():
    _, groups = random_trees()
    values = prefix_values(groups)
    for g, i, t in product(range(3), range(6), range(8)):
        alike = [j for j in range(6) if groups.forks[g, i, j] >= t]
        expected = groups.rewards[g, i] if t >= groups.lengths[g, i] else groups.rewards[g, alike].mean()
        assert abs(values[g, i, t] - expected) < 1e-14


def test_tempo_by_hand():
    """GRPO's advantage and the change of value at each token, over the standard deviation and the length."""
    logprobs, groups = a_tree()
    changes = [[-0.1, 0.1, 0.5], [-0.1, 0.1, -0.5], [-0.1, -0.2, 0.0], [0.3, 0.0, 0.0]]
    std = (sum((r - 0.5) ** 2 for r in REWARDS[0].tolist()) / 4) ** 0.5
    expected = [
        [-(r - 0.5 + change) / (std + 1e-4) / n / 4 for change in row]
        for r, n, row in zip(REWARDS[0].tolist(), LENGTHS[0].tolist(), changes, strict=True)
    ]
    found = coefficients("tempo", logprobs, groups)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-14)


def test_what_tempo_adds_to_grpo_sums_to_the_centred_reward_along_a_response_and_is_exactly_0_off_the_forks():
    logprobs, groups = random_trees()
    added = coefficients("tempo", logprobs, groups) - coefficients("grpo", logprobs, groups)
    centred = groups.rewards - groups.rewards.mean(1, keepdim=True)
    scale = -3 * 6 * groups.lengths * (groups.rewards.std(1, keepdim=True, correction=0) + 1e-4)
    torch.testing.assert_close(added.sum(-1) * scale, centred, rtol=0, atol=1e-13)
    changes, at = prefix_values(groups).diff(dim=-1), torch.arange(7)
    leaves_another = (groups.forks[..., None] == at).any(2) & (at < groups.lengths[..., None])
    last = at == groups.lengths[..., None] - 1  # where another goes on
    assert (changes[~leaves_another & ~last] == 0).all() and changes.any()


def test_maxrl_of_right_and_wrong_by_hand():
    """K winners of N: N / K - 1 for each, -1 for the others; nothing where none is right."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0] * 4, [1.0] * 4], dtype=torch.float64)
    logprobs = torch.zeros(4, 4, 1, dtype=torch.float64)
    apart = torch.eye(4, dtype=torch.long).expand(4, 4, 4)
    groups = Groups(logprobs, rewards, preferences(rewards, 0.1), apart, torch.ones(4, 4))
    expected = [[3.0, -1.0, -1.0, -1.0], [1 / 3, 1 / 3, 1 / 3, -1.0], [0.0] * 4, [0.0] * 4]
    found = coefficients("maxrl", logprobs, groups)[..., 0] * -16
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_maxrl_refuses_a_negative_reward():
    """-1 and +1 in a group have a mean of 0 or below: dividing by it would turn the gradient round."""
    logprobs, groups = a_tree(torch.tensor([[1.0, -1.0, -1.0, 0.8]], dtype=torch.float64))
    with pytest.raises(UserError, match="maxrl divides by the mean reward .* is -1"):
        coefficients("maxrl", logprobs, groups)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_maxrl_in_expectation_follows_the_first_terms_of_the_log_likelihood(n):
    """Over all groups of n one-token responses: grad of -sum_{k < n} (1 - p)^k / k, p the chance of a right one."""
    theta = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    right = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    p = (theta.softmax(0) * right).sum()
    exact = torch.autograd.grad(-sum((1 - p) ** k / k for k in range(1, n)), theta, retain_graph=True)[0]
    total = torch.zeros(3, dtype=torch.float64)
    pi = theta.detach().softmax(0)
    for group in product(range(3), repeat=n):
        rewards = right[list(group)][None]
        logprobs = pi.log()[list(group)].view(1, n, 1)
        groups = Groups(logprobs, rewards, preferences(rewards, 0.1), torch.zeros(1, n, n).long(), torch.ones(1, n))
        c = coefficients("maxrl", logprobs, groups)[0, :, 0]
        score = torch.eye(3, dtype=torch.float64)[list(group)] - pi
        total -= pi[list(group)].prod() * (c[:, None] * score).sum(0)
    torch.testing.assert_close(total, exact, rtol=0, atol=1e-14)


def test_branch_weights_by_hand():
    """At each pair's fork, the mean of those that go the one way less that of those that go the other."""
    _, groups = a_tree()
    w = pair_weights(groups, "branch")[0]
    expected = {
        (0, 1): 1.0 - 0.0,  # both alone behind their fork: the gap
        (0, 2): 0.5 - 0.2,  # behind 5 6 are the first and the second
        (2, 1): 0.0,  # the third beats the second, but its way is worse on average than 5 6: not counted
        (3, 1): 0.8 - 0.4,  # behind 5 are three
        (3, 2): 0.8 - 0.4,
        (0, 3): 0.0,
    }
    assert {pair: pytest.approx(float(w[pair])) for pair in expected} == expected
    beats = {tuple(pair) for pair in groups.beats[0].nonzero().tolist()}
    assert beats == set(expected)


def test_a_pair_whose_branch_is_the_worse_one_teaches_nothing():
    logprobs, groups = a_tree()
    only = torch.zeros_like(groups.beats)
    only[0, 2, 1] = True
    settings = dict(pair_weight="branch", use_ranking_loss=False)
    assert not coefficients("gspo", logprobs, replace(groups, beats=only), **settings).any()
    assert coefficients("gspo", logprobs, groups, **settings).any()


def test_branch_weights_of_responses_that_share_no_token_are_their_gaps():
    _, groups = random_trees()
    alone = groups.lengths[:, :, None] * torch.eye(6, dtype=torch.long)
    gap, branch = (pair_weights(replace(groups, forks=alone), kind) for kind in ("gap", "branch"))
    torch.testing.assert_close(branch, gap.clamp_min(0), rtol=0, atol=1e-15)


CASES = [("maxrl", {}), ("tempo", {}), ("gspo", {"pair_weight": "branch"})]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_coefficients_equal_finite_differences_token_by_token(name, settings):
    logprobs, groups = random_trees(2, 4, 5)
    cfg, counts, eps = Objective(algorithm=name, **settings), Counts(2, 3.0), 1e-5
    total = lambda x: float(sum(ALGORITHMS[name].loss(x, groups, cfg, counts).values()))  # noqa: E731
    numeric = torch.zeros_like(logprobs)
    for place in product(range(2), range(4), range(5)):
        step = torch.zeros_like(logprobs)
        step[place] = eps
        numeric[place] = (total(logprobs + step) - total(logprobs - step)) / (2 * eps)
    torch.testing.assert_close(coefficients(name, logprobs, groups, counts, **settings), numeric, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_order_of_responses_and_the_cut_into_micro_batches_change_nothing(name, settings):
    logprobs, groups = random_trees()
    whole = coefficients(name, logprobs, groups, **settings)
    order = torch.tensor([3, 0, 5, 4, 1, 2])
    fields = {k: v[:, order] for k, v in vars(groups).items() if v is not None}
    moved = Groups(**{**fields, **{k: fields[k][:, :, order] for k in ("beats", "forks")}})
    torch.testing.assert_close(coefficients(name, logprobs[:, order], moved, **settings), whole[:, order])
    for part in ([0], [2, 1]):
        width = int(groups.lengths[part].max())
        found = coefficients(name, logprobs[part, :, :width], groups.select(part, width), Counts(3, 4.0), **settings)
        torch.testing.assert_close(found, whole[part, :, :width], rtol=0, atol=1e-16)

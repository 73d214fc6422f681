"""Credit at the fork: where two responses part, what cancels, and that it is the policy's own gradient there."""

from itertools import product

import pytest
import torch

from gspo.algorithm.gaps import from_fork, gaps
from gspo.algorithm.objective import Counts, Groups, evaluate
from gspo.algorithm.pairs import forks, preferences
from gspo.config import Objective

TOKENS = torch.tensor([[[5, 6, 7, 0], [5, 6, 8, 9], [5, 6, 0, 0], [5, 6, 7, 0]]])
LENGTHS = torch.tensor([[3, 4, 2, 3]])


def a_group(seed=0):
    g = torch.Generator().manual_seed(seed)
    real = torch.arange(4) < LENGTHS[..., None]
    draw = lambda: torch.randn(1, 4, 4, generator=g, dtype=torch.float64) * real  # noqa: E731
    rewards = torch.tensor([[1.0, 0.5, 0.0, 1.0]])
    return draw(), Groups(draw(), rewards, preferences(rewards, 0.1), forks(TOKENS, LENGTHS), LENGTHS)


def test_forks_by_hand():
    """They part where tokens differ, or where the shorter one ends; the padding's 0 is no token."""
    expected = [[3, 2, 2, 3], [2, 4, 2, 2], [2, 2, 2, 2], [3, 2, 2, 3]]
    assert forks(TOKENS, LENGTHS).tolist() == [expected]
    tokens = torch.tensor([[[1, 0], [1, 0]]])
    assert forks(tokens, torch.tensor([[1, 2]])).tolist() == [[[1, 1], [1, 2]]], "a real 0 is not the padding"


def test_the_weights_from_the_fork_on_by_hand():
    values = torch.tensor([[[1.0, 2.0, 4.0, 0.0], [10.0, 20.0, 40.0, 80.0]]])
    seen = from_fork(values, torch.tensor([[[3, 1], [1, 4]]]), 0.5)
    assert seen.tolist() == [[[0.0, 2.0 + 0.5 * 4.0], [20.0 + 0.5 * 120.0, 0.0]]]


def test_whole_answers_are_dpos_difference_of_sums():
    """after_fork 1: what two answers share cancels, so counting from the fork changes nothing."""
    logprobs, groups = a_group()
    # Under one model, tokens that are alike have equal log-probs.
    for x in (logprobs, groups.anchors):
        x[:, :, :2] = x[:, :1, :2]
        x[:, 3] = x[:, 0]
    s = 0.1 * (logprobs - groups.anchors).sum(-1)
    mine = gaps(logprobs, groups, Objective(after_fork=1.0))
    torch.testing.assert_close(mine, s[:, :, None] - s[:, None, :], rtol=0, atol=1e-15)


def test_at_zero_only_the_tokens_at_a_fork_learn():
    logprobs, groups = a_group()
    c = evaluate(logprobs, groups, Objective(after_fork=0.0), Counts(1, 5.0)).coefficients[0]
    real = torch.arange(4) < LENGTHS[0, :, None]  # one that was cut off parts in its padding, which reaches nothing
    assert ((c != 0) & real).nonzero().tolist() == [[0, 2], [1, 2], [3, 2]]
    assert c[0, 2] < 0 < c[1, 2], "up for who wins there, down for who loses to both"
    more = evaluate(logprobs, groups, Objective(after_fork=0.3), Counts(1, 5.0)).coefficients[0]
    assert more[1, 3] > 0 and more[:, :2].abs().max() == 0, "what is shared learns nothing at any setting"


# ---- the expected gradient, over every group that the policy can sample ----

# Two tokens of a two-token vocabulary, after the start, after 0, and after 1: three states, four responses.
RESPONSES = list(product((0, 1), (0, 1)))
MARGIN = 0.1


def policy_gradients(theta, reward):
    """The policy gradient sum_a grad pi(a|s) Q(s, a) of each state's two logits, theta [3, 2], reward [4] -> [3, 2]."""
    pi, found = theta.softmax(-1), []
    for state in range(3):
        if state == 0:
            q = torch.stack([(pi[1 + a] * reward[2 * a : 2 * a + 2]).sum() for a in (0, 1)])
        else:
            q = reward[2 * (state - 1) : 2 * state]
        own = theta[state].clone().requires_grad_()
        found.append(torch.autograd.grad((own.softmax(-1) * q).sum(), own)[0])
    return torch.stack(found)


def expected_ascent(theta, reward, cfg, n):
    """-E[dL/dtheta] of the objective over all groups of n responses, on-policy, [3, 2]."""
    logp, total, tokens = theta.log_softmax(-1), torch.zeros_like(theta), torch.tensor(RESPONSES)
    token_logp = torch.stack([torch.stack([logp[0, a], logp[1 + a, b]]) for a, b in RESPONSES])
    lengths = torch.full((1, n), 2)
    for group in product(range(4), repeat=n):
        lp, rewards = token_logp[list(group)][None], reward[list(group)][None]
        apart = forks(tokens[list(group)][None], lengths)
        groups = Groups(lp, rewards, preferences(rewards, MARGIN), apart, lengths)
        c = evaluate(lp, groups, cfg, Counts(1, 1.0)).coefficients[0]
        for k, response in enumerate(group):
            a, b = RESPONSES[response]
            for state, token, coef in ((0, a, c[k, 0]), (1 + a, b, c[k, 1])):
                onehot = torch.eye(2, dtype=torch.float64)[token]
                total[state] -= lp.sum().exp() * coef * (onehot - theta[state].softmax(-1))
    return total


def preference_only(weight, after=0.3):
    """The preference term where a round begins: the policy is its own anchor."""
    return Objective(
        anchor="old",
        pair_weight=weight,
        margin=MARGIN,
        use_ranking_loss=False,
        after_fork=after,
        normalizer="constant",
    )


GRADED, BINARY = (torch.tensor(r, dtype=torch.float64) for r in ([0.0, 0.3, 1.0, 0.15], [0.0, 1.0, 1.0, 0.0]))


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(("weight", "reward"), [("gap", GRADED), ("one", BINARY)], ids=["gap", "one, binary rewards"])
def test_the_expected_gradient_at_a_state_is_the_policys_own(weight, reward, n):
    """It is each state's policy gradient, times how often two of the group come by: d(s)^2 at the fork for d(s) once,
    and `after` times what is missing from the second."""
    torch.manual_seed(0)
    theta = torch.randn(3, 2, dtype=torch.float64)
    visits = torch.tensor([1.0, *theta[0].softmax(-1)], dtype=torch.float64)[:, None]
    for after in (0.0, 0.4, 1.0):
        cfg = preference_only(weight, after)
        share = visits**2 + after * visits * (1 - visits)  # two come by and part here, or one comes by alone
        # sigmoid(0) = 1/2, and each pair of Z = N(N-1)/2 has two responses.
        expected = cfg.preference_beta * share * policy_gradients(theta, reward)
        torch.testing.assert_close(expected_ascent(theta, reward, cfg, n), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("n", [2, 3])
def test_with_graded_rewards_equal_weights_may_push_against_the_policy_gradient(n):
    """After 0 comes a reward of 1.0 with probability 0.35, else 0; after 1 always 0.2. 0 is worth more, and loses more
    often: pairs that count alike push it down, pairs that count by their gap lift it."""
    theta = torch.tensor([[0.5, 0.5], [0.35, 0.65], [0.5, 0.5]], dtype=torch.float64).log()
    reward = torch.tensor([1.0, 0.0, 0.2, 0.2], dtype=torch.float64)
    right = policy_gradients(theta, reward)[0, 0]
    one, gap = (expected_ascent(theta, reward, preference_only(weight), n)[0, 0] for weight in ("one", "gap"))
    assert one < 0 < min(right, gap)
    assert right == pytest.approx(0.25 * (0.35 - 0.2)), "pi(0) pi(1) (Q(0) - Q(1))"
    assert Objective().pair_weight == "one", "equal weights are the default"

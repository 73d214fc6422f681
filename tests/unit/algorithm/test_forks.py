"""Credit at the fork: where two responses part, what cancels, and that it is the policy's own gradient there."""

from itertools import product

import torch

from gspo.algorithm.objective import Counts, Groups, evaluate, from_fork, gaps
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


def test_the_expected_gradient_at_a_state_is_the_policys_own():
    """Two tokens of a two-token vocabulary: over all groups of two, on-policy, with gap weights, the gradient at each
    state is its policy gradient sum_a grad pi(a|s) Q(s, a), times how often both answers come by: d(s)^2 at the fork
    for d(s) once, and `after` times what is missing from the second."""
    torch.manual_seed(0)
    theta = torch.randn(3, 2, dtype=torch.float64)  # states: the start, after 0, after 1
    answers = list(product((0, 1), (0, 1)))
    reward = torch.tensor([0.0, 0.3, 1.0, 0.2], dtype=torch.float64)
    logp = theta.log_softmax(-1)
    token_logp = torch.stack([torch.stack([logp[0, a], logp[1 + a, b]]) for a, b in answers])
    prob = token_logp.sum(-1).exp()
    tokens = torch.tensor(answers)
    visits = torch.tensor([1.0, *logp[0].exp()], dtype=torch.float64)

    def q_gradient(state):
        own = theta[state].clone().requires_grad_()
        pi = own.softmax(-1)
        if state == 0:
            q = torch.stack([(logp[1 + a].exp() * reward[2 * a : 2 * a + 2]).sum() for a in (0, 1)])
        else:
            q = reward[2 * (state - 1) : 2 * state]
        return torch.autograd.grad((pi * q).sum(), own)[0]

    for after in (0.0, 0.4, 1.0):
        cfg = Objective(anchor="old", pair_weight="gap", margin=0.0, use_ranking_loss=False, after_fork=after)
        total = torch.zeros_like(theta)
        for i, j in product(range(4), repeat=2):
            pair = [i, j]
            rewards = reward[pair][None]
            apart = forks(tokens[pair][None], torch.tensor([[2, 2]]))
            lp = token_logp[pair][None]
            groups = Groups(lp, rewards, preferences(rewards, 0.0), apart, torch.tensor([[2, 2]]))
            c = evaluate(lp, groups, cfg, Counts(1, 1.0)).coefficients[0]
            for k, answer in enumerate(pair):
                a, b = answers[answer]
                for state, token, coef in ((0, a, c[k, 0]), (1 + a, b, c[k, 1])):
                    onehot = torch.eye(2, dtype=torch.float64)[token]
                    total[state] -= prob[i] * prob[j] * coef * (onehot - theta[state].softmax(-1))
        for state in range(3):
            d = visits[state]
            weight = d * d + after * d * (1 - d)  # both come by and part here, or one comes by alone
            scale = cfg.preference_beta  # Z = 1, sigmoid(0) = 1/2, two answers
            torch.testing.assert_close(total[state], scale * weight * q_gradient(state), rtol=1e-10, atol=1e-14)

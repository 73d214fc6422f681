"""What a tree's gradient is in expectation, by enumerating every tree of a small policy: three tokens, of which one
ends a response, and responses of one to three tokens."""

from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gspo.algorithm.objective import Counts, Groups, evaluate
from gspo.algorithm.pairs import branch_weights, forks, preferences
from gspo.config import Objective
from gspo.rollout.tree import Tree

END, LONGEST = 2, 3
STATES = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
RESPONSES = [
    y
    for length in (1, 2, 3)
    for y in product((0, 1, END), repeat=length)
    if END not in y[:-1] and (y[-1] == END or length == LONGEST)
]
COUNT = len(RESPONSES)  # 15
LENGTHS = torch.tensor([len(y) for y in RESPONSES])
TOKENS = torch.tensor([[*y, *[0] * (LONGEST - len(y))] for y in RESPONSES])
REAL = torch.arange(LONGEST) < LENGTHS[:, None]
STATE = torch.tensor([[STATES.index(y[: min(t, len(y) - 1)]) for t in range(LONGEST)] for y in RESPONSES])
LOGITS = torch.randn(len(STATES), 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
BINARY = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1])
GRADED = torch.rand(COUNT, generator=torch.Generator().manual_seed(5))

LOGPROBS = torch.where(REAL, LOGITS.log_softmax(-1)[STATE, TOKENS], 0.0)
PROBABILITY = LOGPROBS.sum(1).exp()
STATE_ENTROPY = -(LOGITS.softmax(-1) * LOGITS.log_softmax(-1)).sum(-1)
ENTROPY = torch.where(REAL, STATE_ENTROPY[STATE], 0.0)


class Forest(NamedTuple):
    """Every group of two trees."""

    members: Tensor  # [G, N], numbers of responses
    probability: Tensor  # [G]


def every_group(tree: Tree) -> Forest:
    """Enumerate the trees of one trunk, as the sampler grows them, then pairs of them."""
    places, trees, chances = tree.places(ENTROPY, LENGTHS).tolist(), [], []
    for trunk, y in enumerate(RESPONSES):
        options = []
        for place in places[trunk]:
            alike = [k for k in range(COUNT) if RESPONSES[k][:place] == y[:place]]  # place = length: the trunk alone
            share = PROBABILITY[alike] / PROBABILITY[alike].sum()
            options.append(list(zip(alike, share.tolist(), strict=True)))
        for branches in product(*options):
            trees.append([trunk, *(k for k, _ in branches)])
            chances.append(
                float(PROBABILITY[trunk]) * torch.tensor([p for _, p in branches], dtype=torch.float64).prod()
            )
    trees, chances = torch.tensor(trees), torch.tensor(chances, dtype=torch.float64)
    first, second = (
        x.flatten() for x in torch.meshgrid(torch.arange(len(trees)), torch.arange(len(trees)), indexing="ij")
    )
    return Forest(torch.cat([trees[first], trees[second]], 1), chances[first] * chances[second])


def expected_gradient(forest: Forest, tree: Tree, cfg: Objective, rewards: Tensor, weighted: bool = True) -> Tensor:
    """Return minus the expected gradient of the loss by the logits of every state, [states, 3]."""
    members, n = forest.members, tree.leaves
    lengths, reward = LENGTHS[members], rewards[members]
    apart = forks(TOKENS[members], lengths)
    logprobs = LOGPROBS[members]
    weights = None
    if weighted:
        places = tree.places(ENTROPY[members.flatten()], LENGTHS[members.flatten()]).view(*members.shape, -1)
        weights = branch_weights(places, tree.trunks, LONGEST)
    groups = Groups(logprobs, reward, preferences(reward, cfg.margin), apart, lengths, weights)
    # The mean over all groups; each counts as often as it occurs.
    coefficients = evaluate(logprobs, groups, cfg, Counts(1, 1.0)).coefficients * forest.probability[:, None, None]
    total = torch.zeros(len(STATES) * 3, dtype=torch.float64)
    at = (3 * STATE + TOKENS)[members].flatten()
    total.index_add_(0, at, torch.where(REAL[members], coefficients, 0.0).flatten())
    total = total.view(len(STATES), 3)
    assert n == members.shape[1]
    return -(total - total.sum(1, keepdim=True) * LOGITS.softmax(-1))


def policy_gradient(rewards: Tensor) -> Tensor:
    """Return the gradient of the expected reward by the logits of every state."""
    leaf = LOGITS.clone().requires_grad_()
    logprobs = torch.where(REAL, leaf.log_softmax(-1)[STATE, TOKENS], 0.0).sum(1)
    return torch.autograd.grad((logprobs.exp() * rewards.double()).sum(), leaf)[0]


def tree_of(at, branches=2):
    return Tree(2, branches, at, {"entropy": 0.8, "even": 1.0}.get(at, 1.0))


LOOKS_BACK = ["entropy", pytest.param("even", marks=pytest.mark.slow)]
RLOO = Objective(algorithm="rloo")
WHOLE = Objective(anchor="old", normalizer="constant", use_ranking_loss=False, after_fork=1.0, margin=0.0)


def test_the_policy_and_its_trees_are_worth_the_enumeration():
    assert float(PROBABILITY.sum()) == pytest.approx(1.0)
    places = tree_of("entropy").places(ENTROPY, LENGTHS)
    assert (places < LENGTHS[:, None]).any(0).all(), "a first and a second place occur"
    assert (places == LENGTHS[:, None]).any(), "and a response that has none"
    assert len(every_group(tree_of("entropy")).members) > 10_000


@pytest.mark.parametrize("at", LOOKS_BACK)
def test_every_leaf_is_distributed_as_the_policy_where_places_depend_on_what_lies_before_them(at):
    forest = every_group(tree_of(at))
    assert float(forest.probability.sum()) == pytest.approx(1.0)
    for leaf in range(6):
        seen = torch.zeros(COUNT, dtype=torch.float64).index_add_(0, forest.members[:, leaf], forest.probability)
        torch.testing.assert_close(seen, PROBABILITY, rtol=1e-10, atol=0)


@pytest.mark.parametrize("at", LOOKS_BACK)
def test_a_trees_gradient_is_the_policy_gradient_in_expectation(at):
    """RLOO with graded rewards, and with binary ones the pairs, of whole responses, when a round begins: a half, the
    slope of the sigmoid at 0, times beta, times two for the two responses of a pair. Exactly a flat group's."""
    tree = tree_of(at)
    forest = every_group(tree)
    found = expected_gradient(forest, tree, RLOO, GRADED)
    torch.testing.assert_close(found, policy_gradient(GRADED), rtol=1e-6, atol=1e-9)
    found = expected_gradient(forest, tree, WHOLE, BINARY)
    torch.testing.assert_close(found, WHOLE.preference_beta * policy_gradient(BINARY), rtol=1e-6, atol=1e-9)


def test_without_weights_states_behind_a_branching_place_count_more():
    """... by the pairs that part there: 6 leaves have 15 pairs, 9 of different trunks, 4 at first and 2 at second
    places. The direction at each state is the policy gradient's all the same."""
    tree = tree_of("even")
    found = expected_gradient(every_group(tree), tree, RLOO, GRADED, weighted=False)
    times = torch.tensor([9, 13, 13, 15, 15, 15, 15], dtype=torch.float64)[:, None] / 15
    torch.testing.assert_close(found, times * policy_gradient(GRADED), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("at", ["most_uncertain", "fractions"])
def test_places_that_look_ahead_bias_leaves_and_gradient(at):
    """Not even the direction at each state is the policy gradient's."""
    tree = tree_of(at, branches=1)
    forest = every_group(tree)
    seen = torch.zeros(COUNT, dtype=torch.float64).index_add_(0, forest.members[:, 1], forest.probability)
    assert (seen - PROBABILITY).abs().sum() > 0.02
    found = expected_gradient(forest, tree, RLOO, GRADED, weighted=False)
    cosine = torch.cosine_similarity(found, policy_gradient(GRADED), dim=1)
    assert cosine.min() < 0.999


@pytest.mark.parametrize("at", LOOKS_BACK)
def test_with_credit_at_the_fork_each_state_moves_along_the_policy_gradient(at):
    """Binary rewards, `after_fork` 0.3: a positive factor for each state; behind a place, larger than flat."""
    tree = tree_of(at)
    cfg = Objective(anchor="old", normalizer="constant", use_ranking_loss=False, after_fork=0.3, margin=0.0)
    found, exact = expected_gradient(every_group(tree), tree, cfg, BINARY), policy_gradient(BINARY)
    factor = (found * exact).sum(1) / (exact * exact).sum(1)
    torch.testing.assert_close(found, factor[:, None] * exact, rtol=1e-6, atol=1e-9)
    visits = torch.tensor(
        [1.0 if not s else float(PROBABILITY[[y[: len(s)] == s for y in RESPONSES]].sum()) for s in STATES]
    )
    flat = cfg.preference_beta * (visits + 0.3 * (1 - visits))
    assert (factor > 0).all() and (factor[3:] > flat[3:]).all()


def test_weights_by_hand():
    """Two trunks of three branches: 28 pairs, 16 of different trunks, and 6, 4 and 2 behind the places of each."""
    places = torch.tensor([[[1, 2, 2]] * 7 + [[2, 3, 4]]])
    found = branch_weights(places, 2, 4)
    assert found[0, 0].tolist() == pytest.approx([28 / 16, 28 / 22, 1.0, 1.0])
    assert found[0, 7].tolist() == pytest.approx([28 / 16, 28 / 16, 28 / 22, 28 / 26])


def test_weights_multiply_each_tokens_coefficient_whatever_the_objective():
    """... also where a micro-batch has some of the groups."""
    g = torch.Generator().manual_seed(0)
    rewards, lengths = torch.rand(3, 6, generator=g), torch.full((3, 6), 3)
    logprobs, weights = torch.randn(3, 6, 3, generator=g), torch.rand(3, 6, 3, generator=g)
    fixed = (rewards, preferences(rewards, 0.0), torch.zeros(3, 6, 6, dtype=torch.long), lengths)
    plain, weighted = (Groups(torch.zeros(3, 6, 3), *fixed, w) for w in (None, weights))
    for name in ("gspo", "rloo", "grpo"):
        cfg, counts = Objective(algorithm=name), Counts(3, 4.0)
        expected = evaluate(logprobs, plain, cfg, counts).coefficients * weights
        found = evaluate(logprobs, weighted, cfg, counts).coefficients
        torch.testing.assert_close(found, expected)
        part = evaluate(logprobs[[2, 0]], weighted.select([2, 0], 3), cfg, counts).coefficients
        torch.testing.assert_close(part, expected[[2, 0]])

"""The pairwise loss: its closed form, its kernel in Triton's interpreter and through the compiler."""

import math

import pytest
import torch
from pairwise_cases import COUNTS, Case, by_closed_form, cases, draw, too_far
from triton_programs import results

from gspo.algorithm.objective import gspo_in_closed_form
from gspo.config import Objective
from gspo.kernels.ops import PairSettings, pairwise_loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_closed_form_is_as_near_to_the_objective_and_autograd_as_rounding_allows(dtype):
    found = cases()
    wrong = [line for case in found for line in too_far(case, dtype=dtype)]
    assert len({case.name() for case in found}) == len(found) == 81 and not wrong, "\n".join(wrong)


def test_a_pair_by_hand():
    """Three tokens, the first shared: a gap of 0.5 * (2 + 0.5 * 4 - 2) = 1, and half the slope behind the fork."""
    logprobs = torch.tensor([[[-9.0, -1.0, -1.0], [-9.0, -3.0, -5.0]]], dtype=torch.float64)
    anchors = torch.tensor([[[0.0, -1.0, -1.0], [-1.0, -2.0, -3.0]]], dtype=torch.float64)
    beats, weights = torch.tensor([[[False, True], [False, False]]]), torch.tensor([[[0.0, 0.7], [5.0, 0.0]]])
    forks, lengths = torch.tensor([[[3, 1], [1, 3]]]), torch.tensor([[3, 3]])
    settings = PairSettings(beta=0.5, groups=1, after_fork=0.5, ranking_coef=2.0, nll_coef=0.3)
    coefs, parts = pairwise_loss(logprobs, anchors, beats, None, forks, lengths, settings)
    loss, chance = math.log(1 + math.exp(-1)), 1 / (1 + math.exp(1))
    expected = [loss, 2 * loss, 0.3 * 11 / 3]
    torch.testing.assert_close(parts, torch.tensor([expected], dtype=torch.float64))
    up = 3 * 0.5 * chance  # both terms are the same for a single pair
    expected = [[-0.1, -up - 0.1, -up / 2 - 0.1], [0.0, up, up / 2]]
    torch.testing.assert_close(coefs, torch.tensor([expected], dtype=torch.float64))

    coefs, parts = pairwise_loss(logprobs, anchors, beats, weights, forks, lengths, settings)
    expected = [0.7 * loss, 2 * loss, 0.3 * 11 / 3]  # a weight is for the preference term, and for pairs only
    torch.testing.assert_close(parts, torch.tensor([expected], dtype=torch.float64))
    torch.testing.assert_close(float(coefs[0, 1, 1]), 2.7 / 3 * up)


def test_a_group_without_pairs_and_one_of_ties():
    logprobs, groups = draw(Case(5, 9, Objective()))
    found = by_closed_form(logprobs, groups, Objective())
    assert all(float(found[key][0]) == 0.0 for key in found if key != "coefficients")
    assert found["coefficients"][0].abs().max() == 0
    assert found["coefficients"][2].abs().max() > 0


def test_no_groups():
    logprobs, groups = draw(Case(3, 4, Objective()))
    none = type(groups)(**{k: v[:0] for k, v in vars(groups).items() if v is not None})
    coefs, parts = gspo_in_closed_form(logprobs[:0], none, Objective(), COUNTS)
    assert coefs.shape == (0, 3, 4) and parts.shape == (0, 3)


@pytest.mark.slow
def test_interpreted_kernel_is_as_near_to_the_objective_as_float32_allows(tmp_path):
    """Unwritten memory is NaN."""
    pytest.importorskip("triton")
    found = results("interpreted_pairwise.py", tmp_path)
    wrong = [line for lines in found.values() for line in lines]
    assert len(found) == 81 and not wrong, "\n".join(wrong)

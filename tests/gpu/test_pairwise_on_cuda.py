"""The pairwise loss on CUDA (`make test-gpu`); skipped where there is none."""

from dataclasses import replace

import pytest
import torch
from pairwise_cases import COUNTS, EVERYTHING, Case, by_objective, cases, distance, draw, too_far

from gspo.algorithm.objective import evaluate, gspo_in_closed_form
from gspo.kernels import pairwise
from gspo.kernels.dispatch import choose

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_as_near_to_the_objective_as_float32_allows(poisoned):
    found = choose(pairwise.IMPLEMENTATIONS, torch.zeros(1, 64, 1, device="cuda"))
    assert found.__module__ == "gspo.kernels.pairwise_triton"
    steep = [Case(8, 1500, replace(EVERYTHING, normalizer=z), 4) for z in ("constant", "batch", "group")]
    wrong = [line for case in cases() + steep for line in too_far(case, "cuda")]
    assert not wrong, "\n".join(wrong)


def test_groups_beyond_the_kernel_and_float64(poisoned):
    assert not too_far(Case(65, 6, EVERYTHING), "cuda")
    assert not too_far(Case(8, 30, EVERYTHING), "cuda", torch.float64)


def test_it_is_one_launch_and_the_same_bits_every_time():
    cfg = replace(EVERYTHING, pair_weight="one")  # other weights are computed before it
    logprobs, groups = draw(Case(12, 700, cfg), "cuda")
    first = gspo_in_closed_form(logprobs, groups, cfg, COUNTS)  # compiles
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        again = gspo_in_closed_form(logprobs, groups, cfg, COUNTS)
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert [name for name in on_device if "kernel" in name] == ["pairwise_kernel"], on_device
    assert torch.equal(first.coefficients, again.coefficients) and torch.equal(first.parts, again.parts)


def test_the_objective_takes_its_coefficients_from_the_kernel():
    logprobs, groups = draw(Case(8, 40, EVERYTHING), "cuda")
    found = evaluate(logprobs, groups, EVERYTHING, COUNTS).coefficients
    assert torch.equal(found, gspo_in_closed_form(logprobs, groups, EVERYTHING, COUNTS).coefficients)
    exact = by_objective(logprobs.double(), groups, EVERYTHING)["coefficients"]
    assert found.dtype == torch.float32 and distance(found, exact) < 1e-5

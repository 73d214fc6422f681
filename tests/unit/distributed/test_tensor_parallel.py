"""A sampler that two ranks share draws the tokens of the whole model, by plain tensors and half of the weights."""

import json

import pytest
from ranks import launch


@pytest.mark.slow
def test_two_ranks_that_share_a_sampler_draw_the_tokens_of_one(run_program):
    done = launch(run_program, 2, "tests/programs/divided_sampler.py")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found.keys() == {"llama", "qwen2", "qwen3"}
    for family, one in found.items():
        assert one["same"] and one["apart"] < 1e-4, (family, one)
        assert one["dispatched"] == 0, "a DTensor's dispatch at every token costs the host more than the product"
        assert 0.5 <= one["share"] < 0.55, (family, one)  # norms are whole on both

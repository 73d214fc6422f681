"""What a step would take with more threads, by the model that benchmarks/step_stages.py prints."""

import pytest
import torch

from benchmarks.step_stages import with_threads


def test_operations_are_divided_by_the_threads_and_waiting_is_not():
    """Of 10 s with one thread 8 are computed: 2 + 8 / 4 with four; what operations claim beyond a stage is not time."""
    torch.set_num_threads(1)
    found = {
        "rollout": (6.0, {"products": 3.0, "attention": 2.0}),
        "update": (4.0, {"products": 2.0, "elementwise": 1.0}),
    }
    assert with_threads(found, 1) == pytest.approx(10.0)
    assert with_threads(found, 4) == pytest.approx(4.0)
    assert with_threads({"update": (4.0, {"products": 9.0})}, 4) == pytest.approx(1.0)

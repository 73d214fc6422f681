"""A bound on a curve that ends a run: when it is reached, and what is no such bound."""

import pytest

from gspo.errors import UserError
from gspo.metrics.run_log import GLOSSARY
from gspo.metrics.stop_when import StopWhen


def observed(wanted, values):
    """Show the values, None for a step without one -> the number of the step after which it was reached, if any."""
    goal = StopWhen(wanted, GLOSSARY)
    for step, value in enumerate(values, 1):
        goal.observe({"reward_mean": 0.0} if value is None else {"heldout/accuracy": value})
        if goal.reached:
            return step
    return None


ACCURACY = {"metric": "heldout/accuracy"}


@pytest.mark.parametrize(
    ("wanted", "values", "step"),
    [
        ({"above": 0.8}, [0.5, 0.8, 0.81, 0.9], 3),
        ({"above": 0.8, "patience": 2}, [0.9, 0.7, 0.9, None, 0.9], 5),  # steps without a value do not count
        ({"below": 0.5, "patience": 1}, [0.6, 0.5, 0.4], 3),
        ({"below": 0.5}, [0.6, float("nan"), 0.6], None),
    ],
)
def test_when_it_is_reached(wanted, values, step):
    assert observed(ACCURACY | wanted, values) == step


def test_without_one_nothing_is_reached():
    assert observed({}, [1.0]) is None


def test_it_says_what_was_reached():
    goal = StopWhen(ACCURACY | {"above": 0.8, "patience": 2}, GLOSSARY)
    for value in (0.85, 0.9):
        goal.observe({"heldout/accuracy": value})
    assert goal.reached == "trainer.stop_when: heldout/accuracy = 0.9 is above 0.8 2 times in a row"


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"metric": "heldout/acuracy", "above": 1}, "did you mean 'heldout/accuracy'"),
        ({"above": 1}, "metric = 'None' is no curve"),
        (ACCURACY, "it needs one bound, above or below"),
        (ACCURACY | {"above": 1, "below": 0}, "it needs one bound, above or below"),
        (ACCURACY | {"above": "high"}, "above = 'high' is no number"),
        (ACCURACY | {"above": True}, "above = True is no number"),
        (ACCURACY | {"below": float("nan")}, "below = nan is no number"),
        (ACCURACY | {"above": 1, "patience": 0}, "patience = 0 is no number of measurements"),
        (ACCURACY | {"above": 1, "patience": 1.5}, "patience = 1.5 is no number of measurements"),
        (ACCURACY | {"above": 1, "minimum": 3}, "'minimum' is no part of it"),
    ],
)
def test_what_is_no_bound(wanted, said):
    with pytest.raises(UserError, match=said):
        StopWhen(wanted, GLOSSARY)

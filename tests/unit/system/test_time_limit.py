"""Lengths of time as users and schedulers write them, and when no further step may begin."""

import pytest

from gspo.errors import UserError
from gspo.system import time_limit
from gspo.system.time_limit import TimeLimit, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("45m", 2700), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172800), ("1H 30M", 5400),
     ("23:30:00", 84600), ("1-12:00:00", 129600), ("0.5", 0.5)],
)  # fmt: skip
def test_a_length_of_time(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0h", "-5m", "soon", "5 minutes", "1:30", "1:75:00", "inf", "nan", "h"])
def test_what_is_no_length_of_time(text):
    with pytest.raises(UserError, match="is no length of time; write 90s"):
        parse_duration(text)


def test_a_step_that_would_end_too_late_does_not_begin(monkeypatch):
    """Steps of 3, 5 and 3 seconds, of 17 in all: at 11 the longest still ends at 16, at 13 not any more."""
    clock = [0.0]
    monkeypatch.setattr(time_limit, "STARTED", 0.0)
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: clock[0])
    limit, said = TimeLimit("17s"), {}
    for clock[0] in (0.0, 3.0, 8.0, 11.0, 13.0):
        said[clock[0]] = limit.reached()
    assert [at for at, why in said.items() if why] == [13.0]
    assert said[13.0] == "trainer.time_limit = 17s leaves no time for another step"
    clock[0] = 1e9
    assert TimeLimit(None).reached() == ""

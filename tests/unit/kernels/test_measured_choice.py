"""How long a measurement goes on, by a clock that only the timed works move."""

from types import SimpleNamespace

import pytest

from gspo.kernels import measured_choice_cpu


@pytest.mark.parametrize(
    "enough, shortest, turns",
    [(100.0, 1.0, 5), (0.0, 1.0, 3)],  # until 1.0 has a like in 1.05; or until there was time enough, but three turns
)
def test_a_shortest_time_that_stands_alone_is_not_believed_at_once(monkeypatch, enough, shortest, turns):
    now, seen = [0.0], []
    lengths = iter([50.0, 3.0, 1.0, 4.0, 9.0, 1.05, 0.1])  # the first, with cold caches, does not count

    def uneven():
        seen.append(next(lengths))
        now[0] += seen[-1]

    def even():
        now[0] += 2.0

    monkeypatch.setattr(measured_choice_cpu, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(measured_choice_cpu, "ENOUGH", enough)
    assert measured_choice_cpu.seconds(uneven, even) == pytest.approx((shortest, 2.0))
    assert len(seen) == 1 + turns

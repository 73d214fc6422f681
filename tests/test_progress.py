"""Progress lines: none for short work, some for long work, none from other ranks."""

import gspo.progress as progress


def test_every_item_passes_in_order(monkeypatch):
    assert list(progress.track([3, 1, 2], "x")) == [3, 1, 2]
    monkeypatch.setenv("RANK", "1")
    assert list(progress.track(iter([3, 1, 2]), "x")) == [3, 1, 2]


def test_short_work_prints_nothing_and_long_work_prints_lines(monkeypatch, capsys):
    list(progress.track(range(50), "short"))
    assert capsys.readouterr().out == ""
    clock = iter(range(0, 10_000, 6))  # six seconds an item
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    list(progress.track(range(9), "long"))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["long: 2 / 9, 18 s", "long: 5 / 9, 36 s", "long: 8 / 9, 54 s"]


def test_other_ranks_are_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    progress.say("not me")
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    progress.say("me")
    assert capsys.readouterr().out == "me\n"

"""The picture of runs' curves."""

import json
import math
import sys

import pytest
from run_on_disk import write_run

from gspo.errors import UserError
from gspo.plot import draw, main, mean_span, smooth


def test_without_matplotlib_what_installs_it_and_what_needs_it_not_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib: `make dev`, or pip install .*`python -m gspo.report`"):
        draw([write_run(tmp_path / "a")], tmp_path / "x.png")


@pytest.mark.parametrize(("steps", "span"), [(1, 1), (10, 1), (29, 1), (30, 3), (50, 5), (89, 7), (90, 9), (5000, 9)])
def test_a_short_run_is_not_smoothed_away(steps, span):
    assert mean_span(steps) == span


def test_the_mean_does_not_cross_the_start_of_a_round():
    values = [0.0] * 5 + [1.0] * 5
    assert smooth([0.0] * 5 + [1.0] * 5, values, 9) == values
    assert smooth([0.0] * 3, [0.0, 3.0, 6.0], 3) == [1.5, 3.0, 4.5]


@pytest.fixture()
def lines(monkeypatch):
    """The lines that are drawn: title of the panel -> [label, values] of each."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    found = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, out, **_: found.update(read(figure)) or out.write_bytes(b""))

    def read(figure):
        found["title"] = figure.get_suptitle()
        return {a.get_title(): [(x.get_label(), list(x.get_ydata())) for x in a.get_lines()] for a in figure.axes}

    return found


def test_several_runs_share_the_panels(lines, tmp_path, monkeypatch):
    for name in ("one", "two"):
        write_run(tmp_path / name, steps=4, rounds=1)
    monkeypatch.setattr("sys.argv", ["plot", str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "x.png")])
    main()
    assert lines["reward_mean"] == [("one", [0.25, 0.5, 0.75, 1.0]), ("two", [0.25, 0.5, 0.75, 1.0])]
    assert (tmp_path / "x.png").exists() and lines["ranking_loss"] == [("one", []), ("two", [])], "what it lacks"


def test_one_run_is_titled_with_its_evaluation_and_what_a_stranger_wrote_is_no_formula(lines, tmp_path):
    folder = write_run(tmp_path / "$a$", steps=6, rounds=2, accuracy=0.8)
    for name, value in (("eval_before", 0.4), ("eval_after", 0.8)):
        report = json.loads((folder / f"{name}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps(report | {"pass@1": value, "greedy": "x"}))
    draw([folder], tmp_path / "x.png")
    assert lines["title"] == r"\$a\$: 6 steps; on 4 unseen problems pass@1 0.40 to 0.80"
    (values, start) = lines["reward_mean"]
    assert values == (r"\$a\$", pytest.approx([k / 6 for k in range(1, 7)])) and start[1] == [0, 1], "round 2 begins"


def test_a_picture_is_written_and_an_unknown_ending_is_named(tmp_path):
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path / "a", steps=3)
    row = {"step": 4, "round": 1.0, "reward_mean": math.nan, "kl_divergence": 0.0}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    draw([folder], tmp_path / "new" / "x.png")
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"x.abc: .*Name a .png, .svg or .pdf file"):
        draw([folder], tmp_path / "x.abc")
    with pytest.raises(UserError, match="is not a run's folder"):
        draw([tmp_path], tmp_path / "x.png")


def test_without_a_chinese_font_the_picture_is_in_english_and_says_so(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import font_manager

    monkeypatch.setenv("GSPO_LANG", "zh")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: ["/usr/share/fonts/DejaVuSans.ttf"])
    draw([write_run(tmp_path / "a")], tmp_path / "picture.png")
    out = capsys.readouterr().out
    assert out.startswith("提示：matplotlib 找不到含中文字符的字体") and out.count("\n") == 1

"""A run that is started again: with another length, with other held-out prompts, and as it was."""

import io
import json
import re
import shutil
import sys

import pytest
import torch
from quick_run import rows

from gspo.distributed.world import World
from gspo.embedded import MODEL_DIR
from gspo.errors import UserError
from gspo.read_config import load_config
from gspo.system import time_limit
from train import train

TINY = ("data.train_batch_size=2", "rollout.n=2", "rollout.max_new_tokens=24", "reward.workers=1",
        "reward.check_rows=0", "optim.warmup_steps=0", "model.precision=fp32", "eval.before_and_after=false",
        "trainer.save_freq=0", "eval.round_prompts=2")  # fmt: skip


def run(folder, *overrides):
    """Train in this process -> the rows of its curves."""
    cfg = load_config("configs/quick.yaml", [*TINY, f"trainer.output_dir={folder}", *overrides])
    train(cfg, World(0, 1, torch.device("cpu"), None))
    return rows(folder / "quick" / "metrics.jsonl")


def state(folder, step):
    file = folder / "quick" / "checkpoints" / f"step_{step:06d}" / "trainer" / "state.json"
    return json.loads(file.read_text())


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_one_waits_for_is_printed_on_a_terminal_and_elsewhere(tmp_path, monkeypatch, capsys, terminal):
    """Two rounds of a step each, whose responses have three tokens at most: they are all cut off."""
    screen = Terminal()
    if terminal:
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setenv("COLUMNS", "400")
    own = ("eval.before_and_after=true", "eval.prompts=2", "eval.n=2", "rollout.max_new_tokens=3")
    run(tmp_path, *own, "trainer.max_steps=2")
    lines = re.split(r"[\r\n]+", screen.getvalue() if terminal else capsys.readouterr().out)
    order = [
        r"CPU, \d threads?.*, fp32 \| model: the embedded model \| .* \| kept in .*quick$",
        r"before training: 2 prompts x 2 responses and a greedy one; eval.before_and_after=false skips it",
        r"before training: greedy 0.000, pass@1 0.000, reward_mean .*, 100% cut off",
        r"warning, before training: 100% of the responses are cut off: raise rollout.max_new_tokens",
        r"before step 1: held-out accuracy 0.000, reward",
        r"warning, step 1: 100% of the responses are cut off: raise rollout.max_new_tokens",
        r" +1 +1/2 +\d" if terminal else r"step 1/2  round 1  .*no pair .*  cut off 1.00  .*left",
        r"round 1 ends, step 1: held-out accuracy 0.000 \(was 0.000\).*win rate .*; the best checkpoint so far",
        r"round 2 begins: the opponent is now the policy of step 1",
        r" +2 +2/2 +\d" if terminal else r"step 2/2  round 2  ",
        r"round 2 ends, step 2: held-out",
        r"after training: 2 prompts",
        r"done in .* s; the last checkpoint: .*step_000002",
        r"the best: .*best, step \d, held-out accuracy 0.000",
    ]
    places = [next((k for k, line in enumerate(lines) if re.match(pattern, line)), -1) for pattern in order]
    assert -1 not in places, order[places.index(-1)]
    assert places == sorted(places)
    saved = [re.search(r"step_\d+(, the best)?$", line)[0] for line in lines if line.startswith("checkpoint ")]
    assert saved[0] == "step_000001, the best" and saved[1].startswith("step_000002") and len(saved) == 2


@pytest.mark.slow
def test_an_extended_run_goes_on_as_one_that_was_planned_with_as_many_rounds_of_that_length(tmp_path, capsys):
    constant = ("optim.schedule=constant", "eval.round_prompts=2")
    run(tmp_path / "a", *constant, "selfplay.rounds=2", "trainer.max_steps=4")
    capsys.readouterr()
    extended = run(tmp_path / "a", *constant, "selfplay.rounds=2", "trainer.max_steps=7")
    said = capsys.readouterr().out
    assert "was to have 4 steps, and now has 7. Rounds keep their length of 2 steps, so there are 4." in said
    assert [row["round"] for row in extended] == [0, 0, 1, 1, 2, 2, 3]
    planned = run(tmp_path / "b", *constant, "selfplay.rounds=4", "trainer.max_steps=8")
    timed = ("time/", "tokens_per_second", "memory/")
    for mine, theirs in zip(extended[:6], planned, strict=False):
        assert {k: v for k, v in mine.items() if not k.startswith(timed)} == {
            k: v for k, v in theirs.items() if not k.startswith(timed)
        }


def test_a_schedule_is_spread_over_the_new_length_and_both_learning_rates_are_said(tmp_path, capsys):
    run(tmp_path, "trainer.max_steps=2")
    capsys.readouterr()
    went_on = run(tmp_path, "trainer.max_steps=4")
    assert [row["round"] for row in went_on] == [0, 1, 2, 3], "rounds go on"
    rates = [row["learning_rate"] for row in went_on]
    assert rates == pytest.approx([3e-4, 3e-5, 3e-4 * (0.1 + 0.9 * 0.25), 3e-5])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "was to have 2 steps" in line]
    assert line.startswith("warning: ") and "goes from 3e-05 to 9.75e-05 at step 3" in line
    assert (state(tmp_path, 4)["planned_steps"], state(tmp_path, 4)["total_steps"]) == (2, 4)


@pytest.mark.parametrize(
    ("before", "after"),
    [(4, 3), *(pytest.param(*counts, marks=pytest.mark.slow) for counts in ((2, 3), (2, 0), (0, 2)))],
)
def test_a_run_goes_on_with_another_number_of_held_out_prompts(tmp_path, capsys, before, after):
    run(tmp_path, "trainer.max_steps=1", "selfplay.rounds=1", f"eval.round_prompts={before}")
    capsys.readouterr()
    went_on = run(tmp_path, "trainer.max_steps=2", "selfplay.rounds=1", f"eval.round_prompts={after}")
    assert len(went_on) == 2 and ("win_rate" in went_on[1]) == (before > 0 < after)
    said = [line for line in capsys.readouterr().out.splitlines() if "eval.round_prompts" in line]
    assert len(said) == 1 and f"was {before} when this round began, and is {after} now" in said[0]


@pytest.mark.slow
def test_held_out_pairs_are_measured_now_and_then_and_a_resumed_run_goes_on_with_them(tmp_path):
    longer = ("rollout.n=4", "rollout.max_new_tokens=32", "eval.round_prompts=4", "data.train_batch_size=4",
              "selfplay.rounds=1", "trainer.max_steps=7", "trainer.save_freq=6",
              "objective.anchor=opponent")  # fmt: skip
    whole = run(tmp_path, *longer)
    curve = [row["preference_accuracy"] for row in whole]
    assert curve[:4] == [0.5] * 4 and curve[4] == curve[5], "each value is carried to the next, of step 5 and 7"
    assert curve[4] != 0.5 and whole[0]["ranking_loss"] == pytest.approx(1.0) and whole[0]["heldout/pairs"] > 5
    assert curve[4] != whole[4]["pairs/accuracy_train"]
    shutil.rmtree(tmp_path / "quick" / "checkpoints" / "step_000007")
    again = run(tmp_path, *longer)
    names = ("preference_accuracy", "ranking_loss", "heldout/pairs", "win_rate", "reward_mean", "pairs/accuracy_train")
    assert [[row.get(name) for name in names] for row in again] == [[row.get(name) for name in names] for row in whole]


@pytest.mark.slow
def test_in_a_good_run_with_an_anchor_both_curves_of_pairs_are_healthy_and_those_of_the_training_batch_are_not(
    tmp_path,
):
    cfg = load_config(
        "configs/quick.yaml",
        ["trainer.max_steps=30", "selfplay.rounds=1", "data.train_batch_size=32", "optim.schedule=constant",
         "eval.before_and_after=false", "trainer.save_freq=0", f"trainer.output_dir={tmp_path}",
         "objective.anchor=opponent"],
    )  # fmt: skip
    train(cfg, World(0, 1, torch.device("cpu"), None))
    curves = rows(tmp_path / "quick" / "metrics.jsonl")
    mean = lambda name, part: sum(row[name] for row in part) / len(part)  # noqa: E731
    assert mean("reward_mean", curves[-5:]) > 0.7 > 0.55 > mean("reward_mean", curves[:3])
    assert all(row["preference_accuracy"] > 0.7 for row in curves[9:])
    measured = [curves[step - 1]["ranking_loss"] for step in (1, 5, 10, 20, 30)]
    assert measured == sorted(measured, reverse=True) and measured[-1] < 0.85
    assert mean("pairs/accuracy_train", curves[-5:]) < 0.6 and mean("pairs/ranking_train", curves[-5:]) > 0.95


def test_a_run_ends_where_a_curve_has_reached_its_bound(tmp_path, capsys):
    """It is evaluated like one that took all steps; the same command takes no further step, another bound goes on."""
    goal = ("eval.freq=1", "trainer.max_steps=4", "trainer.stop_when.metric=heldout/reward_mean")
    ended = run(tmp_path, *goal, "trainer.stop_when.above=-1", "trainer.stop_when.patience=2")
    said = capsys.readouterr().out
    assert len(ended) == 2 and "is above -1 2 times in a row: ended after step 2 of 4" in said
    assert len(run(tmp_path, *goal, "trainer.stop_when.above=-1", "trainer.stop_when.patience=2")) == 2
    assert len(run(tmp_path, *goal, "trainer.stop_when.above=2")) == 4


def test_a_run_leaves_with_a_checkpoint_before_its_time_is_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(time_limit, "STARTED", -1e9)  # the process began long ago
    with_time = run(tmp_path, "trainer.max_steps=2", "trainer.save_freq=1", "eval.round_prompts=0")
    assert len(with_time) == 2
    capsys.readouterr()
    assert len(run(tmp_path, "trainer.max_steps=4", "trainer.time_limit=1h", "eval.round_prompts=0")) == 2
    said = capsys.readouterr().out
    assert "trainer.time_limit = 1h leaves no time for another step: left after step 2 of 4" in said
    assert (tmp_path / "quick" / "checkpoints" / "step_000002").is_dir()


TEMPLATE = "{% for m in messages %}Q: {{ m.content }}\nA:{% endfor %}"


def test_a_run_does_not_go_on_with_another_chat_template(tmp_path):
    """Of a file, wherever it is, or of the model itself: it is known by its text."""
    file, model = tmp_path / "t.jinja", tmp_path / "m"
    file.write_text(TEMPLATE)
    shutil.copytree(MODEL_DIR, model)
    given = ("trainer.max_steps=1", "trainer.run_name=quick", f"data.chat_template={file}")
    run(tmp_path / "a", *given)
    file.rename(tmp_path / "moved.jinja")
    moved = f"data.chat_template={tmp_path / 'moved.jinja'}"
    run(tmp_path / "a", *given[:2], moved)
    (tmp_path / "moved.jinja").write_text(TEMPLATE.replace("Q", "Question"))
    with pytest.raises(UserError, match=r"data.chat_template = .*moved.jinja.: the chat template has another .*=never"):
        run(tmp_path / "a", *given[:2], moved)
    with pytest.raises(UserError, match="data.chat_template = None, model.path = None: the chat template has another"):
        run(tmp_path / "a", *given[:2])
    own = (f"model.path={model}", "data.train_files=embedded", "data.val_files=embedded", *given[:2])
    run(tmp_path / "b", *own)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(UserError, match="model.path = .*m': the chat template has another text .*trainer.run_name"):
        run(tmp_path / "b", *own)


TWO_LEVELS = """
import zlib

def compute_score(solution_str):
    return {low} * (zlib.crc32(solution_str.encode()) % 2)
"""


@pytest.mark.parametrize(("algorithm", "low", "said"), [("gspo", 0.1, True), ("grpo", 0.1, False), ("grpo", 0.0, True)])
def test_held_out_prompts_whose_responses_are_rewarded_alike_are_told_before_the_first_step(
    tmp_path, capsys, algorithm, low, said
):
    """Rewards of 0.1 and 0 are within GSPO's margin; GRPO, which has none, learns from them, but not from 0 and 0."""
    (tmp_path / "reward.py").write_text(TWO_LEVELS.format(low=low))
    own = (f"reward.path={tmp_path / 'reward.py'}", f"objective.algorithm={algorithm}", "eval.round_prompts=8")
    run(tmp_path, *own, "rollout.n=4", "rollout.max_new_tokens=12", "trainer.max_steps=1", "selfplay.rounds=1")
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("warning, before step 1: only ")]
    assert len(lines) == said, out
    if said:
        margin = ", by more than objective.margin = 0.1" if algorithm == "gspo" else ""
        assert f"only 0 of 8 held-out prompts have responses that are rewarded differently{margin}." in lines[0]
        assert out.index("before step 1: held-out") < out.index(lines[0]) < out.index("step 1/1")

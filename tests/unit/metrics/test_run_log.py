"""Curves, sample tables and warnings: what stands in the files is what was measured, also after a crash."""

import json

import pytest
import torch
from saved_run import no_file_above
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from gspo.algorithm.pairs import preferences
from gspo.config import Config, Health
from gspo.metrics.group_rows import sample_rows
from gspo.metrics.run_log import GLOSSARY, SEED_FIVE, RunLog
from gspo.metrics.trackers import drop_steps_after
from gspo.models.loading import load_tokenizer
from gspo.types import Experience, Groups, Prompt, Rollout, Scores

DERIVED = {"response/length_ratio", "entropy_ratio", "winner_logprob_drop", "heldout/diverging"}  # by health.py
REWARDS = [[0.1, 1.0, 0.0, 0.5], [0.1, 0.0, 0.1, 0.0]]
TOKENIZER = load_tokenizer(None)
IDS = tuple(TOKENIZER("<|user|>x + 1 = 2<|assistant|>")["input_ids"])
TEXTS = [["five", "seven", "who knows", "6 + 1 = 8, seven"], ["a", "b", "c", "d"]]


def metrics(step, **changed):
    """One value a name of the glossary, another one every step."""
    values = {name: 0.01 * i + step for i, name in enumerate(GLOSSARY)}
    return {**values, "reward/acc": 0.25 * step, "tokens": 1234.0, **changed}


def an_experience(rewards=REWARDS, texts=TEXTS, margin=0.1):
    rewards = torch.tensor(rewards)
    zeros = torch.zeros(*rewards.shape, 1)
    prompts = [Prompt(g, IDS, f"问题 {g}?", "7", "math") for g in range(len(rewards))]
    rollout = Rollout(prompts, zeros.long(), rewards.long() + 1, zeros, zeros, rewards >= 0, texts)
    beats = preferences(rewards, margin)
    groups = Groups(zeros, rewards, beats, beats.long(), rollout.lengths)
    return Experience(rollout, groups, zeros, [*range(len(rewards))], len(rewards), int(beats.sum()))


def rows_of(experience, count):
    """Scored as what is learned from."""
    return sample_rows(experience, Scores(experience.groups.rewards), count, TOKENIZER)


def track(folder, steps, start=0, **changed):
    log = RunLog(folder, Config(), start)
    for step in steps:
        log.log(step, metrics(step, **changed), total_steps=9)
        log.samples(step, [rows_of(an_experience(), 1)])
    log.close()


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def board(folder):
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return accumulator


def curve(accumulator, tag):
    return [(e.step, e.value) for e in accumulator.Scalars(tag)]


# ---- the curves ----


def test_one_object_a_step_with_the_names_and_values_of_tensorboard(tmp_path):
    track(tmp_path, [1, 2, 3])
    rows, events = lines(tmp_path / "metrics.jsonl"), board(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    tags = {tag for tag in events.Tags()["scalars"] if not tag.startswith("healthy/")}
    for row in rows:
        assert set(row) == {"step"} | tags
        expected = metrics(row["step"])
        assert {k: v for k, v in row.items() if k not in DERIVED} == {
            "step": row["step"],
            **{k: expected[k] for k in tags - DERIVED},
        }
    for tag in tags:
        assert curve(events, tag) == [(row["step"], pytest.approx(row[tag])) for row in rows]
    assert tags == {*GLOSSARY, "reward/acc"}  # nothing unexplained, and the user's own numbers


def test_the_seeds_five_tags():
    assert SEED_FIVE == ("reward_mean", "reward_max", "preference_accuracy", "kl_divergence", "ranking_loss")
    assert set(SEED_FIVE) <= set(GLOSSARY)


def test_a_page_shows_what_to_watch_with_healthy_limits(tmp_path):
    track(tmp_path, [1, 2])
    events = board(tmp_path)
    (event,) = events.Tensors("custom_scalars__config__")
    (category,) = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category
    shown = {chart.title.split()[0]: [tag[1:-1] for tag in chart.multiline.tag] for chart in category.chart}
    assert shown == {
        "reward_mean": ["reward_mean"],
        "reward_max": ["reward_max"],
        "preference_accuracy": ["preference_accuracy", "healthy/preference_accuracy_min"],
        "kl_divergence": ["kl_divergence", "healthy/kl_divergence_min"],
        "ranking_loss": ["ranking_loss"],
        "heldout/accuracy": ["heldout/accuracy"],
        "response/length_mean": ["response/length_mean"],
        "response/cutoff": ["response/cutoff"],
    }
    assert {tag for tags in shown.values() for tag in tags} <= set(events.Tags()["scalars"])
    for bound, value in {"preference_accuracy_min": 0.6, "kl_divergence_min": 0.001}.items():
        assert curve(events, f"healthy/{bound}") == [(1, pytest.approx(value)), (2, pytest.approx(value))]


def test_a_metric_that_a_step_lacks_is_left_out(tmp_path, capsys):
    log = RunLog(tmp_path, Config(), 0)
    row = {k: v for k, v in metrics(1).items() if k not in ("preference_accuracy", "win_rate")}
    log.log(1, row, total_steps=1)
    log.close()
    assert not {"preference_accuracy", "win_rate"} & set(lines(tmp_path / "metrics.jsonl")[0])
    assert "step 1/1" in capsys.readouterr().out


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    track(tmp_path, [1])
    assert list(tmp_path.iterdir()) == []


# ---- a full disk ----


def test_what_a_full_disk_does_not_take_is_written_when_there_is_room_again(tmp_path, capsys):
    log = RunLog(tmp_path, Config(), 0)
    for step in (1, 2):
        log.log(step, metrics(step), total_steps=9)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with no_file_above(size + 100):  # step 3 would end in the middle of a line
        for step in (3, 4):
            log.log(step, metrics(step), total_steps=9)
            log.samples(step, [rows_of(an_experience(), 1)])
        assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    said = [line for line in capsys.readouterr().out.splitlines() if "written" in line]
    assert len(said) == 1 and "cannot be written (File too large); they wait in memory" in said[0]
    log.log(5, metrics(5), total_steps=9)
    log.close()
    assert "are written again, none is missing" in capsys.readouterr().out
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [step for step, _ in curve(board(tmp_path), "reward_mean")] == [1, 2, 3, 4, 5]
    assert {row["step"] for row in lines(tmp_path / "samples.jsonl")} == {3, 4}


# ---- resuming ----


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path):
    track(tmp_path, [1, 2, 3, 4])
    track(tmp_path, [3, 4], start=2, reward_mean=0.5)
    rows, events = lines(tmp_path / "metrics.jsonl"), board(tmp_path)
    expected = [(1, metrics(1)["reward_mean"]), (2, metrics(2)["reward_mean"]), (3, 0.5), (4, 0.5)]
    assert [(row["step"], row["reward_mean"]) for row in rows] == expected
    assert curve(events, "reward_mean") == [(step, pytest.approx(value)) for step, value in expected]
    assert [row["step"] for row in lines(tmp_path / "samples.jsonl")] == [1, 2, 3, 4]


def test_a_new_run_in_an_old_folder_starts_empty(tmp_path):
    track(tmp_path, [1, 2])
    track(tmp_path, [1])
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("cut", [1, 5, 12, 19, 23])
def test_a_half_written_last_line_is_dropped_wherever_it_ends(tmp_path, cut):
    path, line = tmp_path / "samples.jsonl", '{"step": 2, "t": "解方程"}\n'.encode()
    path.write_bytes('{"step": 1, "t": "解"}\n'.encode() + line[:cut])
    drop_steps_after(path, 5)
    assert path.read_text(encoding="utf-8") == '{"step": 1, "t": "解"}\n'


@pytest.mark.parametrize("odd", ["\u2028", "\u0085", "\x0b\x0c", "\x1c\x1e", "\r", "\n"])
def test_cutting_keeps_lines_whose_text_holds_odd_line_ends(tmp_path, odd):
    log = RunLog(tmp_path, Config(), 0)
    texts = [[f"a{odd}b", "c", "d", "e"]]
    log.samples(1, [rows_of(an_experience(REWARDS[:1], texts), 1)])
    log.close()
    before = (tmp_path / "samples.jsonl").read_bytes()
    drop_steps_after(tmp_path / "samples.jsonl", 1)
    assert (tmp_path / "samples.jsonl").read_bytes() == before
    assert lines(tmp_path / "samples.jsonl")[0]["responses"] == texts[0]


def test_cutting_nothing_and_a_file_that_is_not_there(tmp_path):
    drop_steps_after(tmp_path / "no.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


# ---- the samples ----


def test_samples_name_the_widest_pair_and_agree_with_the_rewards(tmp_path):
    log = RunLog(tmp_path, Config(), 0)
    log.samples(3, [rows_of(an_experience(), 5)])
    log.close()
    first, second = lines(tmp_path / "samples.jsonl")
    assert first == {
        "step": 3,
        "prompt": "问题 0?",
        "model_input": "<|user|>x + 1 = 2<|assistant|>",
        "data_source": "math",
        "ground_truth": "7",
        "responses": TEXTS[0],
        "rewards": REWARDS[0],
        "lengths": [1, 2, 1, 1],
        "finish_reasons": ["stop"] * 4,
        "reward_parts": {},
        "chosen": "seven",
        "rejected": "who knows",
    }
    # 0.1 against 0.0 is no pair at margin 0.1
    assert (second["rewards"], second["chosen"], second["rejected"]) == (REWARDS[1], None, None)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_no_more_groups_are_written_than_asked(tmp_path, count):
    log = RunLog(tmp_path, Config(), 0)
    log.samples(1, [rows_of(an_experience(), count)])
    log.close()
    assert [row["prompt"] for row in lines(tmp_path / "samples.jsonl")] == ["问题 0?", "问题 1?"][:count]


def test_the_first_samples_are_a_table_on_the_board(tmp_path):
    log = RunLog(tmp_path, Config(), 0)
    texts = [["5 | 6", "line\nbreak", "", "x"]]
    log.samples(1, [rows_of(an_experience(REWARDS[:1], texts), 1)])
    log.close()
    (event,) = board(tmp_path).Tensors("samples/0/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text.splitlines()[4:] == [
        "| 1 | line<br>break | chosen |",
        "| 0.5 | x |  |",
        "| 0.1 | 5 &#124; 6 |  |",
        "| 0 |  | rejected |",
    ]


# ---- the warnings ----

WELL = {"preference_accuracy": 0.8, "mismatch": 1e-4, "response/cutoff": 0.0, "pairs/groups_without": 0.3,
        "pairs/gap_std": 0.1, "winner_logprob": -0.5, "entropy": 0.7, "skipped_updates": 0.0, "reward/faults": 0.0,
        "empty_updates": 0.0, "response/length_mean": 16.0, "response/length_max": 32.0, "round": 0.0}  # fmt: skip


def run(folder, steps, start=0, **changed):
    """A run whose KL gets out of hand."""
    log = RunLog(folder, Config(health=Health(patience=3, **changed)), start)
    for step in steps:
        log.log(step, metrics(step, **WELL) | {"kl_divergence": 0.05 * step * step}, total_steps=9)
    log.close()
    return log


def told(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("warning", "alarm"))]


def test_warnings_and_alarms_are_printed_with_their_step(tmp_path, capsys):
    run(tmp_path, range(1, 8))
    warning, alarm = told(capsys)
    assert warning.startswith("warning, step 4: kl_divergence is above 0.1: raise objective.kl_coef or lower optim.")
    assert alarm.startswith("alarm, step 5: kl_divergence is above 0.5, now 1.25; ") and "objective.kl_coef" in alarm


@pytest.mark.parametrize("cut", range(8))
def test_a_resumed_run_warns_as_the_uninterrupted_one(tmp_path, capsys, cut):
    """Of what it had told it says nothing; counts and initial values go on."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    expected = run(whole, range(1, 8), on_alarm="stop")
    said = told(capsys)
    run(parts, range(1, cut + 3), on_alarm="stop")  # two steps more than its last checkpoint holds
    before = [line for line in told(capsys) if int(line.split()[2].strip(":")) <= cut]
    resumed = run(parts, range(cut + 1, 8), start=cut, on_alarm="stop")
    assert before + told(capsys) == said and len(said) == 2
    assert lines(parts / "metrics.jsonl") == lines(whole / "metrics.jsonl")
    assert expected.health.alarmed.startswith("kl_divergence is above 0.5, now 1.25")
    assert vars(resumed.health) == vars(expected.health)


def test_derived_curves_are_written_like_the_others(tmp_path):
    log = RunLog(tmp_path, Config(), 0)
    for step, length in enumerate([10.0, 12.0, 14.0, 24.0], 1):
        log.log(step, metrics(step) | {"response/length_mean": length}, total_steps=4)
    log.close()
    ratios = [row["response/length_ratio"] for row in lines(tmp_path / "metrics.jsonl")]
    assert ratios == pytest.approx([1.0, 12 / 11, 14 / 12, 2.0])
    assert curve(board(tmp_path), "response/length_ratio") == [(i, pytest.approx(r)) for i, r in enumerate(ratios, 1)]

"""What is checked before a run, and what it says at its end."""

import json
import os
import re
import shlex
import subprocess

import pytest
import torch
from repository import ROOT
from saved_run import ALONE, a_run
from transformers import AutoConfig

from gspo.checkpoint.checkpoints import State
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.launch_checks import (
    check_launch,
    check_steps,
    final_words,
    say_fine,
    say_notes,
    say_progress,
    say_what_changed,
)
from gspo.models.loading import load_model_config
from gspo.read_config import load_config
from train import train

# ---- the launch ----


def a_world(size=1):
    return World(0, size, torch.device("cpu"), None)


@pytest.mark.parametrize(
    ("overrides", "size", "wanted"),
    [
        (["trainer.n_gpus=8"], 1, 8),
        (["trainer.n_gpus=1"], 2, 1),
        (["trainer.n_gpus=4", "trainer.nnodes=2"], 4, 8),
    ],
)
def test_another_number_of_processes_than_asked_for_is_refused(overrides, size, wanted):
    with pytest.raises(UserError) as e:
        check_launch(load_config(None, overrides), load_model_config(None), a_world(size))
    assert f"asks for {wanted} processes, this run has {size}" in str(e.value) and "torchrun" in str(e.value)


def test_answers_longer_than_a_models_frequencies_allow_are_refused_before_training():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = AutoConfig.for_model("llama", rope_parameters=rope, max_position_embeddings=1024)
    check_launch(load_config(None, ["rollout.max_new_tokens=24", "data.max_prompt_length=1000"]), config, a_world())
    with pytest.raises(UserError, match=r"1,025 tokens.*1,024.*data.max_prompt_length"):
        check_launch(load_config(None, ["rollout.max_new_tokens=25", "data.max_prompt_length=1000"]), config, a_world())


def test_an_unknown_algorithm_is_refused_with_the_names_there_are():
    with pytest.raises(UserError, match=r"objective.algorithm = 'remax' is not one of gspo, rloo, grpo.*ALGORITHMS"):
        check_launch(load_config(None, ["objective.algorithm=remax"]), load_model_config(None), a_world())


def test_a_tree_without_equally_many_branches_a_trunk_is_refused():
    with pytest.raises(UserError, match=r"rollout.n = 8 is no multiple of rollout.trunks = 3"):
        check_launch(load_config(None, ["rollout.trunks=3"]), load_model_config(None), a_world())


@pytest.mark.parametrize(
    ("overrides", "size", "said"),
    [
        (["optim.learning_rate=3e-4"], 1, []),
        (["optim.learning_rate=3e-4", "trainer.n_gpus=2", "trainer.nnodes=2"], 4, []),
        ([], 1, ["optim.learning_rate = 1e-06", "3e-4"]),
        (["model.path=some/model"], 1, []),
        (
            ["optim.learning_rate=3e-4", "rollout.top_p=0.9"],
            1,
            ["warning", "not sampled from the distribution that is trained", "kl_divergence", "entropy", "top_p=1"],
        ),
        (["optim.learning_rate=3e-4", "rollout.top_k=5"], 1, ["warning"]),
        (["optim.learning_rate=3e-4", "rollout.min_p=0.1"], 1, ["warning"]),
        (["optim.learning_rate=3e-4", "rollout.trunks=2"], 1, []),
        (
            ["optim.learning_rate=3e-4", "rollout.trunks=2", "rollout.branch_at=fractions"],
            1,
            ["warning: rollout.branch_at = fractions", "biases the gradient", "entropy and even do not"],
        ),
    ],
)
def test_what_may_surprise_is_said_and_nothing_else(capsys, overrides, size, said):
    cfg = load_config(None, overrides)
    check_launch(cfg, load_model_config(None), a_world(size))
    assert capsys.readouterr().out == "", "what a wrong start says is its error alone"
    say_notes(cfg)
    out = capsys.readouterr().out
    assert bool(out) == bool(said)
    assert [part for part in said if part not in out] == []


def test_one_line_names_model_data_and_reward(run_program, tmp_path):
    rows, reward = tmp_path / "my rows.jsonl", tmp_path / "my_reward.py"
    rows.write_text('{"prompt": "1 + 1?", "ground_truth": "2"}\n' * 3)
    reward.write_text("def judge(solution_str, **rest):\n    return float('2' in solution_str)\n")
    done = run_program(
        "train.py", "--config", "configs/quick.yaml", "--check", f"data.train_files={rows}", f"reward.path={reward}",
        "reward.name=judge", "reward.workers=1", "reward.check_rows=0", "data.val_files=embedded",
    )  # fmt: skip
    first = done.stdout.splitlines()[0]
    devices, model, data, judged = first.split(" | ")
    assert re.fullmatch(r"CPU, \d+ threads?(; an NVIDIA driver .*)?, auto", devices)
    assert model == "model: the embedded model"
    assert data.startswith(f"data: train {rows} (3 rows); val data/equations/dev.json (256")
    assert judged.startswith("reward: ") and "the default" not in judged
    assert judged.endswith("my_reward.py: judge, right from 1 on (reward.correct_at) or by `acc`")


def test_a_batch_that_holds_all_prompts_is_said(capsys):
    cfg = load_config(None, ["rollout.n=8", "data.train_batch_size=256"])
    say_fine(cfg, 256, 15, 8)
    assert capsys.readouterr().out == "fine: 256 prompts, 15 steps of 256 x 8 responses\n"
    say_fine(cfg, 64, 15, 8)
    assert capsys.readouterr().out == (
        "fine: 64 prompts, 15 steps of 64 x 8 responses; data.train_batch_size = 256, so a batch holds all 64 prompts\n"
    )


@pytest.mark.parametrize("name", ["trainer.max_steps", "trainer.total_epochs"])
def test_fewer_steps_than_are_done_are_named_in_one_line_with_the_cure(capsys, tmp_path, name):
    cfg = load_config(None, [f"{name}=12"])
    say_progress(tmp_path, 12, cfg, 12)
    assert capsys.readouterr().out == f"{tmp_path}: 12 of 12 steps done\n"
    say_progress(tmp_path, 163, cfg, 12)
    (line,) = capsys.readouterr().out.splitlines()
    assert f"has done 163 steps, and {name} ends it after 12, so nothing is trained" in line and f"raise {name}" in line


@pytest.mark.parametrize(
    ("overrides", "total", "said"),
    [
        ([], 3, []),
        ([], 2, ["selfplay.rounds = 3", "after step 2", "Lower selfplay.rounds"]),
        (["optim.warmup_steps=9"], 10, []),
        (["optim.warmup_steps=10"], 10, ["optim.warmup_steps = 10", "after step 10", "to 1e-06 of 1e-06"]),
        (["optim.warmup_steps=20"], 10, ["optim.warmup_steps = 20", "to 5e-07 of 1e-06", "Lower optim.warmup_steps"]),
        (["optim.schedule=cosine"], 10, ["optim.schedule = cosine", "step 10, the last", "optim.min_lr_ratio"]),
        (["optim.schedule=linear"], 10, ["optim.schedule = linear", "optim.min_lr_ratio"]),
        (["optim.schedule=cosine", "optim.min_lr_ratio=0.1"], 10, []),
    ],
)
def test_steps_that_do_not_suffice_are_warned_of_in_one_line(capsys, overrides, total, said):
    check_steps(load_config(None, overrides), total)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == bool(said) and all(line.startswith("warning: ") for line in lines)
    assert [part for part in said if part not in lines[0]] == []


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (State(step=100, planned_steps=100, total_steps=200), None),  # as it was
        (State(step=100, planned_steps=100, total_steps=100), "from 3e-05 to 0.000164 at step 101"),
        (State(step=60, planned_steps=100, total_steps=100), "to 0.000244 at step 61"),
        (State(step=200, planned_steps=100, total_steps=100), None),  # nothing is left to do
        (State(step=5), None),  # an earlier version's checkpoint does not say how long its run was to be
    ],
)
def test_another_length_is_said_with_the_learning_rates_and_the_rounds(capsys, state, said):
    cosine = ["optim.learning_rate=3e-4", "optim.schedule=cosine", "optim.min_lr_ratio=0.1", "selfplay.rounds=2"]
    say_what_changed(state, load_config(None, cosine), 200, held_out=0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (said is not None)
    assert not said or said in lines[0] and "Rounds keep their length of 50 steps, so there are 4." in lines[0]


# ---- the end ----


def test_the_last_words_hold_both_evaluations_and_where_things_are(tmp_path):
    for name, value in (("before", 0.25), ("after", 0.75)):
        row = {
            "step": 150,
            "settings": {},
            "prompts": 512,
            "samples": 8,
            "pass@1": value,
            "interval": {"pass@1": [value - 0.125, value + 0.125]},
        }
        (tmp_path / f"eval_{name}.json").write_text(json.dumps(row))
    words = final_words(tmp_path, tmp_path / "checkpoints/step_000150")
    assert "512 held-out prompts, 8 samples each" in words
    header, row = words.splitlines()[2:4]
    assert header.split() == ["before", "after"]
    assert row.split() == ["pass@1", "0.250", "[0.125,", "0.375]", "0.750", "[0.625,", "0.875]"]
    assert str(tmp_path / "checkpoints/step_000150") in words and f"-m gspo.samples {tmp_path}" in words


@pytest.mark.parametrize("name", ["有 空格", "it's", "$HOME", "a;b", "plain"])
def test_the_commands_to_type_next_can_be_pasted(tmp_path, name):
    folder = tmp_path / name
    words = final_words(folder, folder / "checkpoints" / "step_000001").splitlines()
    commands = {line.split()[0]: shlex.split(line)[1:] for line in words if line.startswith(("  curves", "  evaluate"))}
    assert commands["curves"][-2:] == ["--logdir", str(folder.parent)], "there the curves have the run's name"
    assert commands["evaluate"][-1] == str(folder / "checkpoints" / "step_000001")


def test_the_last_words_say_when_nothing_was_evaluated(tmp_path):
    assert "nothing was evaluated" in final_words(tmp_path, tmp_path / "step_000001")


def test_the_check_looks_at_what_is_resumed_and_changes_nothing(tmp_path, tokenizer):
    fast = ("reward.workers=1", "reward.check_rows=0", f"trainer.output_dir={tmp_path}")
    train(cfg := load_config("configs/quick.yaml", fast), ALONE, check_only=True)
    assert list(tmp_path.iterdir()) == []
    for resume in ("nowhere", str(tmp_path)):
        with pytest.raises(
            UserError, match="trainer.resume = .*(neither auto, never nor force|not a checkpoint folder)"
        ):
            train(load_config("configs/quick.yaml", [*fast, f"trainer.resume={resume}"]), ALONE, check_only=True)
    a_run(tmp_path, tokenizer, *fast).save(1)
    files = sorted(tmp_path.rglob("*"))
    train(cfg, ALONE, check_only=True)
    with pytest.raises(UserError, match="holds a run with rollout.n = 4, but this command has 6"):
        train(load_config("configs/quick.yaml", [*fast, "rollout.n=6"]), ALONE, check_only=True)
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("ranks", ["1", "8"])
def test_the_launcher_checks_on_one_process(ranks):
    command = ["./train.sh", "--n_gpus", ranks, "--check", "--rollout_n", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHON": "/bin/echo"})
    assert done.returncode == 0, done.stderr
    program, *flags = done.stdout.split()
    assert program.endswith("/train.py") and "--check" in flags and "rollout_n=4" in flags
    assert f"trainer.n_gpus={ranks}" in flags

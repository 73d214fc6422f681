"""Folders of runs: what may follow on what, what is kept, and that a damaged checkpoint is not gone on from."""

import fcntl
import os
import shutil
import subprocess
import sys
import threading

import pytest
import yaml
from saved_run import ALONE, a_run

from gspo.checkpoint import manifest, run_folder
from gspo.checkpoint.find_runs import latest_checkpoint
from gspo.checkpoint.run_folder import open_run, save_reward_function
from gspo.errors import UserError
from gspo.read_config import load_config


@pytest.fixture()
def run(tmp_path, tokenizer):
    run = a_run(tmp_path, tokenizer)
    run.save(4)
    return run


def again(run, *overrides):
    cfg = load_config("configs/quick.yaml", [f"trainer.output_dir={run.folder.parent}", *overrides])
    return open_run(cfg, ALONE)


def test_the_same_run_goes_on_and_another_is_refused(run):
    step = run.folder / "checkpoints" / "step_000004"
    assert again(run) == (run.folder, step)
    for free in ("trainer.max_steps=999", "optim.micro_batch_tokens=7", "health.patience=3", "eval.n=2"):
        assert again(run, free)[1] == step
    for other in ("trainer.seed=1", "optim.learning_rate=1", "rollout.n=5", "objective.margin=0.2", "model.path=x"):
        with pytest.raises(UserError, match=other.split("=")[0]):
            again(run, other)


def test_a_refusal_names_all_differences_and_the_ways_to_go_on(run):
    step = run.folder / "checkpoints" / "step_000004"
    with pytest.raises(UserError) as e:
        again(run, "optim.learning_rate=1e-5", "objective.kl_coef=0.5", "trainer.max_steps=999")
    said = str(e.value)
    assert "objective.kl_coef = 0.001, but this command has 0.5; " in said and "max_steps" not in said
    assert "optim.learning_rate = 0.0003, but this command has 1e-05. " in said
    for way in (f"trainer.resume={step} trainer.run_name=NEW", "trainer.resume=force", "trainer.resume=never"):
        assert way in said
    with pytest.raises(UserError) as e:
        again(run, "optim.learning_rate=1e-5", "rollout.n=6")
    assert "rollout.n = 4" in str(e.value) and "resume=force" not in str(e.value), "a group's size is no coefficient"


def test_force_goes_on_with_other_step_sizes_and_keeps_what_held_before(run, capsys):
    step, history = run.folder / "checkpoints" / "step_000004", run.folder / "config_history.yaml"
    assert again(run, "trainer.resume=force")[1] == step and not history.exists(), "nothing has changed"
    forced = ("trainer.resume=force", "optim.learning_rate=1e-5", "health.patience=7")
    assert again(run, *forced) == (run.folder, step)
    assert f"from step 5 on: optim.learning_rate = 1e-05 (was 0.0003); {history} keeps" in capsys.readouterr().out
    rate, patience = {"from": 0.0003, "to": 1e-05}, {"from": 5, "to": 7}
    first = {"after_step": 4, "changed": {"optim.learning_rate": rate, "health.patience": patience}}
    assert yaml.safe_load(history.read_text()) == [first]
    assert again(run, *forced[1:])[1] == step, "the run has these settings now"
    with pytest.raises(UserError, match="optim.learning_rate = 1e-05, but this command has 0.0003"):
        again(run, forced[2])
    run.save(6)
    again(run, "trainer.resume=force", forced[2])
    second = {"after_step": 6, "changed": {"optim.learning_rate": {"from": 1e-05, "to": 0.0003}}}
    assert yaml.safe_load(history.read_text()) == [first, second]
    again(run, "trainer.resume=never")
    assert not history.exists()


@pytest.mark.parametrize("setting", ["rollout.n=6", "trainer.seed=3", "objective.anchor=initial"])
def test_force_changes_no_other_settings(run, setting):
    with pytest.raises(UserError, match=f"{setting.split('=')[0]} = .*this command has"):
        again(run, "trainer.resume=force", "optim.learning_rate=1e-5", setting)
    assert not (run.folder / "config_history.yaml").exists()


def test_force_begins_a_run_where_there_is_none(run):
    assert again(run, "trainer.resume=force", "trainer.run_name=other")[1] is None


def test_resume_never_renames_the_folder_of_the_old_run(run):
    assert again(run, "trainer.resume=never") == (run.folder, None)
    aside = [p for p in run.folder.parent.iterdir() if p.name.startswith("quick-")]
    assert len(aside) == 1 and (aside[0] / "checkpoints" / "step_000004" / "model.safetensors").exists()
    assert (run.folder.parent / "checkpoints").resolve() == run.folder / "checkpoints"


@pytest.mark.parametrize("resume", ["never", "FOLDER"])
def test_after_a_restart_by_torchrun_the_run_resumes(run, monkeypatch, resume, tmp_path):
    """The command said where to begin; that was done before the restart."""
    step = run.folder / "checkpoints" / "step_000004"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert again(run, f"trainer.resume={resume}") == (run.folder, step)
    assert [p.name for p in run.folder.parent.iterdir() if p.name.startswith("quick")] == ["quick"]


def test_a_run_that_began_from_a_checkpoint_goes_on_from_its_own(run):
    """The same command, after a preemption, must not begin again; to go back takes another name."""
    begin = f"trainer.resume={run.folder / 'checkpoints' / 'step_000004'}"
    other = "trainer.run_name=other"
    folder, taken = again(run, begin, other)
    assert taken.parent.parent == run.folder and folder.name == "other"
    shutil.copytree(taken, folder / "checkpoints" / "step_000009")
    assert again(run, begin, other)[1] == folder / "checkpoints" / "step_000009"
    assert again(run, begin)[1] == taken
    newer = run.save(6)
    with pytest.raises(UserError, match=r"has gone on to step_000006 since"):
        again(run, begin)
    assert again(run)[1] == newer


@pytest.mark.parametrize(("typed", "near"), [("nevr", "never"), ("atuo", "auto"), ("step_000099", "a checkpoint")])
def test_a_resume_that_is_neither_a_word_nor_a_folder_is_refused_beside_an_existing_run_too(run, typed, near):
    with pytest.raises(UserError, match=rf"resume = '{typed}' is neither auto, never nor force.*Do you mean .*{near}"):
        again(run, f"trainer.resume={typed}")


def test_a_run_goes_on_although_the_checkpoint_that_it_began_from_is_gone(run):
    begin = [f"trainer.resume={run.folder / 'checkpoints' / 'step_000004'}", "trainer.run_name=other"]
    folder, taken = again(run, *begin)
    shutil.move(taken, folder / "checkpoints" / "step_000009")
    assert again(run, *begin)[1] == folder / "checkpoints" / "step_000009"


def test_the_folder_of_a_run_means_its_newest_checkpoint(run):
    newest = run.folder / "checkpoints" / "step_000004"
    assert latest_checkpoint(run.folder) == latest_checkpoint(run.folder / "checkpoints") == newest
    assert latest_checkpoint(run.folder.parent) == run.folder.parent / "checkpoints" / "step_000004"


def test_a_run_goes_on_under_another_name_of_its_folder(run):
    os.close(run_folder._locks.pop(run.folder))
    other = run.folder.rename(run.folder.with_name("other"))
    assert again(run, "trainer.run_name=other") == (other, other / "checkpoints" / "step_000004")


def test_leftovers_of_a_killed_run_are_removed(run):
    for name in ("checkpoints/step_000009.part/trainer", "checkpoints/beside.part"):
        (run.folder / name).mkdir(parents=True)
    (run.folder / "metrics.jsonl.part").write_text("{")
    (run.folder / "checkpoints/.best.part").symlink_to("step_000009")
    again(run)
    assert [p for p in run.folder.parent.rglob("*.part")] == [] and run.names() == ["step_000004"]


def test_a_folder_that_another_process_trains_in_is_refused(run, monkeypatch):
    monkeypatch.setattr("gspo.checkpoint.run_folder.LOCK_TIMEOUT_S", 0.3)
    hold = (
        f"import fcntl, os, time; fcntl.flock(os.open({str(run.folder)!r}, os.O_RDONLY), fcntl.LOCK_EX); "
        "print(flush=True); time.sleep(99)"
    )
    os.close(run_folder._locks.pop(run.folder))
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    other.stdout.readline()
    for resume in ("auto", "never"):
        with pytest.raises(UserError, match="is being trained in by another process"):
            again(run, f"trainer.resume={resume}")
    other.kill()
    other.wait()
    assert again(run)[1].name == "step_000004"


def every_file(checkpoint):
    return sorted(p for p in checkpoint.rglob("*") if p.is_file())


def test_a_flipped_byte_in_any_file_is_found_and_the_checkpoint_before_is_used(run, capsys):
    """First, last and a byte in between of each file; every byte of the manifest itself."""
    newest = run.save(6)
    assert len(every_file(newest)) >= 9
    for file in every_file(newest):
        whole = file.read_bytes()
        is_manifest = file.name == manifest.NAME
        for at in range(len(whole)) if is_manifest else (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            said = manifest.find_damage(newest, ALONE)
            assert file.relative_to(newest).as_posix() in said, (file, at, said)
        file.write_bytes(whole)
        assert manifest.find_damage(newest, ALONE) == ""

        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert again(run)[1].name == "step_000004"
        (warning,) = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("checkpoint ")]
        assert warning.startswith(f"warning: {newest} is damaged: {file.relative_to(newest)}")
        assert run.names() == ["step_000004", "step_000006.damaged"], "and the next step 6 has room"
        (newest.with_name("step_000006.damaged")).rename(newest)
        file.write_bytes(whole)
    assert again(run)[1] == newest and capsys.readouterr().out == ""


def test_a_file_that_is_missing_or_cut_is_found(run):
    step = run.folder / "checkpoints" / "step_000004"
    for file in every_file(step):
        if file.name == "manifest.json":
            continue
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        assert f"has {len(whole) - 1} bytes instead of {len(whole)}" in manifest.find_damage(step, ALONE)
        file.unlink()
        assert "is missing" in manifest.find_damage(step, ALONE)
        file.write_bytes(whole)


def test_with_only_damaged_checkpoints_the_run_stops(run):
    (run.folder / "checkpoints/step_000004/config.json").unlink()
    (run.folder / "checkpoints/step_000002").mkdir()
    with pytest.raises(UserError, match=r"step_000002 is damaged.*so is every one before it.*trainer.resume=never"):
        again(run)
    for _ in range(2):  # nor when it is asked again, as torchrun does
        with pytest.raises(UserError, match=r"only damaged checkpoints \(step_000004.damaged\).*resume=never"):
            again(run)
    assert again(run, "trainer.resume=never")[1] is None


def test_a_checkpoint_saved_while_waiting_for_the_lock_is_resumed_from(run):
    os.close(run_folder._locks.pop(run.folder))
    other = os.open(run.folder, os.O_RDONLY)  # another process that comes to its end
    fcntl.flock(other, fcntl.LOCK_EX)

    def end():
        run.save(6)
        os.close(other)

    timer = threading.Timer(0.5, end)
    timer.start()
    assert again(run)[1].name == "step_000006"
    timer.join()


def test_a_run_whose_config_cannot_be_read_is_refused(run):
    for damage in (lambda f: f.write_text("a: [b"), lambda f: f.write_text("7"), lambda f: f.unlink()):
        damage(run.folder / "config.yaml")
        with pytest.raises(UserError, match=r"config.yaml cannot be read .*Put it back, or .*trainer.resume=never"):
            again(run)


def test_a_million_steps_are_more_than_999_999(run):
    for step in (999_999, 1_000_000):
        run.save(step)
    assert again(run)[1].name == "step_1000000" == latest_checkpoint(run.folder / "checkpoints").name


def test_resume_names_the_checkpoint_that_was_meant(run):
    for folder in (run.folder, run.folder / "checkpoints"):
        with pytest.raises(UserError, match=r"not a checkpoint folder.*Do you mean .*/checkpoints/step_000004\?"):
            again(run, f"trainer.resume={folder}", "trainer.run_name=other")


def test_a_damaged_checkpoint_that_the_user_named_is_an_error_and_is_not_renamed(run):
    step = run.folder / "checkpoints" / "step_000004"
    (step / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"step_000004' is damaged: config.json"):
        again(run, f"trainer.resume={step}", "trainer.run_name=other")
    assert step.exists()


def test_a_checkpoint_without_a_manifest_counts_as_damaged_unless_the_user_named_it(run, capsys):
    newest = run.save(6)
    (newest / "manifest.json").unlink()
    named = (f"trainer.resume={newest}", "trainer.run_name=other")
    assert again(run, *named)[1] == newest, "changed by hand"
    weights = newest / "trainer" / "opponent.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="is damaged: it has no manifest.json, and "):
        again(run, *named)
    weights.write_bytes(whole)
    assert again(run)[1].name == "step_000004" and "it has no manifest.json" in capsys.readouterr().out


def test_a_real_folder_named_checkpoints_is_left_alone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.txt").write_text("precious")
    open_run(load_config("configs/quick.yaml", [f"trainer.output_dir={tmp_path}"]), ALONE)
    assert (tmp_path / "checkpoints" / "mine.txt").read_text() == "precious"


def test_an_unfinished_checkpoint_is_never_the_latest(run):
    (run.folder / "checkpoints" / "step_000009.part" / "trainer").mkdir(parents=True)
    (run.folder / "checkpoints" / "step_000008").mkdir()
    assert latest_checkpoint(run.folder / "checkpoints").name == "step_000004"


def test_a_reward_function_changed_between_resumes_is_warned_of_and_both_are_kept(tmp_path, capsys):
    save_reward_function(tmp_path, "return 0.5", 0)
    save_reward_function(tmp_path, "return 0.5", 20)
    assert capsys.readouterr().out == ""
    save_reward_function(tmp_path, "return 1.0", 40)
    assert "has changed since this run began" in capsys.readouterr().out
    assert (tmp_path / "reward_func.py").read_text() == "return 1.0"
    assert (tmp_path / "reward_func_until_step_40.py").read_text() == "return 0.5"
    save_reward_function(tmp_path, "return 0.0", 0)
    assert capsys.readouterr().out == "" and (tmp_path / "reward_func.py").read_text() == "return 0.0", "a run anew"

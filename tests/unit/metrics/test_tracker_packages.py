"""Trackers of other packages, which here are modules that record, raise, hang or are missing: training goes on."""

import json
import textwrap

import pytest

from gspo.config import Config, Reward, Trainer
from gspo.errors import UserError
from gspo.metrics import tracker_process
from gspo.metrics.run_log import GLOSSARY, RunLog, check_trackers
from gspo.metrics.tracker_packages import PACKAGES
from gspo.metrics.tracker_process import TrackerProcess, config_of
from gspo.read_config import load_config

RECORDS = """
import json, os
def note(*what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(what) + "\\n")
class Run:
    class info:
        run_id = "ours"
    def log(self, values, step): note("log", step, values["reward_mean"])
    def finish(self): note("finish")
def init(**given):
    print("this is no answer")
    note("init", given)
    return Run()
start_run = init
log = log_metrics = Run().log
finish = end_run = Run().finish
def set_experiment(name): note("experiment", name)
def log_params(given): note("params", given)
"""


@pytest.fixture()
def package(tmp_path, monkeypatch):
    """Put a module on the path of this process and of those it starts; it notes its calls, which are returned."""
    (tmp_path / "modules").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))

    def install(name, code):
        (tmp_path / "modules" / f"{name}.py").write_text(RECORDS + textwrap.dedent(code))
        return lambda: [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]

    return install


def configuration(*trackers):
    trainer = Trainer(trackers=[*trackers], project_name="p", run_name="r")
    return Config(trainer=trainer, reward=Reward(reward_kwargs={"key": "secret"}))


def log_steps(folder, cfg, steps=(1, 2, 3), start=0):
    folder.mkdir(exist_ok=True)
    log = RunLog(folder, cfg, start)
    for step in steps:
        log.log(step, dict.fromkeys(GLOSSARY, float(step)), total_steps=9)
    log.close()
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def warned(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "trainer.trackers" in line]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_gets_the_runs_name_its_settings_and_every_step(name, package, tmp_path, capsys):
    notes = package(name, "")
    assert log_steps(tmp_path / "run", configuration(name)) == [1, 2, 3]
    calls = notes()
    assert warned(capsys) == []
    opened = json.dumps([call for call in calls if call[0] in ("init", "experiment", "params")])
    assert '"p"' in opened and '"r"' in opened and '"rollout.n"' in opened and "secret" not in opened
    logged = [call[:3] for call in calls if call[0] == "log"]
    assert logged == [["log", step, float(step)] for step in (1, 2, 3)] and calls[-1] == ["finish"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_run_that_goes_on_is_the_same_one_there_and_a_new_one_is_not(name, package, tmp_path):
    notes = package(name, "")
    for start in (0, 3, 0):
        log_steps(tmp_path / "run", configuration(name), steps=(start + 1,), start=start)
    ids = [call[1].get("id", call[1].get("run_id")) for call in notes() if call[0] == "init"]
    if name == "mlflow":  # it gives a run its number, and is told the number of one that goes on
        assert ids == [None, "ours", None]
    else:
        assert ids[0] == ids[1] != ids[2]


FAILING = {
    "raises when it is imported": ("raise RuntimeError('broken\\ninstall')", "failed (RuntimeError: broken install)"),
    "raises when it is opened": ("def init(**given): raise OSError('no login')", "failed (OSError: no login)"),
    "leaves when it is opened": ("def init(**given): raise SystemExit(3)", "failed (SystemExit: 3)"),
    "asks for a password": ("def init(**given): input()", "failed (EOFError: EOF when reading a line)"),
    "raises at a step": ("def log(self, values, step): 1 / (step - 2)\nRun.log = log", "failed (ZeroDivisionError"),
    "raises at the end": ("def finish(self): raise KeyError('x')\nRun.finish = finish", "failed (KeyError: 'x')"),
    "ends its process": ("def log(self, values, step): os._exit(0)\nRun.log = log", "failed (its process has ended)"),
}


@pytest.mark.parametrize("how", FAILING)
def test_a_package_that_fails_is_left_out_and_one_line_says_so(how, package, tmp_path, capsys):
    code, said = FAILING[how]
    package("wandb", code)
    assert log_steps(tmp_path / "run", configuration("wandb")) == [1, 2, 3]
    (line,) = warned(capsys)
    assert line.startswith(f"warning: trainer.trackers: wandb {said}") and line.endswith("goes on without it.")


def test_the_others_go_on_beside_one_that_fails(package, tmp_path, capsys):
    package("wandb", "raise RuntimeError")
    notes = package("swanlab", "")
    log_steps(tmp_path / "run", configuration("wandb", "tensorboard", "swanlab"))
    assert [call[1] for call in notes() if call[0] == "log"] == [1, 2, 3] and len(warned(capsys)) == 1
    assert [*(tmp_path / "run" / "tensorboard").iterdir()]


HANGING = {
    "when it is opened": ("def init(**given): time.sleep(1e6)", "has not answered for 0.5 s"),
    "at a step": ("def log(self, values, step): time.sleep(1e6)\nRun.log = log", "0.5 s"),
    "at the end": ("def finish(self): time.sleep(1e6)\nRun.finish = finish", "0.5 s"),
    "and holds the interpreter": ("def log(self, *v, **k): ctypes.PyDLL(None).sleep(99999)\nRun.log = log", "0.5 s"),
}


@pytest.mark.parametrize("when", HANGING)
def test_a_package_that_hangs_is_ended_and_one_line_says_so(when, package, tmp_path, capsys, monkeypatch):
    code, said = HANGING[when]
    package("wandb", f"import time, ctypes\n{code}")
    monkeypatch.setattr(tracker_process, "CALL_S", 0.5)
    if "opened" in when:
        monkeypatch.setattr(tracker_process, "OPEN_S", 0.5)
    started = []
    monkeypatch.setattr(TrackerProcess, "_end", lambda self, end=TrackerProcess._end: (started.append(self), end(self)))
    assert log_steps(tmp_path / "run", configuration("wandb")) == [1, 2, 3]
    (line,) = warned(capsys)
    assert line.startswith("warning: trainer.trackers: wandb has not ") and said in line
    assert started[0].process.poll() is not None, "nothing of it is left"


def test_a_package_that_is_missing_is_named_with_how_to_install_it(tmp_path, capsys):
    tracker = TrackerProcess("no_such_tracker", tmp_path, configuration(), 0)
    tracker.metrics(1, {})
    tracker.close()
    (line,) = warned(capsys)
    assert line == (
        "warning: trainer.trackers: no_such_tracker is not installed (pip install no_such_tracker); training goes on "
        "without it."
    )


def test_the_limit_of_a_call_is_half_a_minute():
    assert tracker_process.CALL_S == 30.0


def test_only_named_trackers_are_opened(tmp_path):
    log_steps(tmp_path / "run", configuration())
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"metrics.jsonl", "samples.jsonl"}
    log_steps(tmp_path / "other", configuration("console", "file", "tensorboard", "tensorboard"))
    assert {path.name for path in (tmp_path / "other").iterdir()} == {"metrics.jsonl", "samples.jsonl", "tensorboard"}
    assert len([*(tmp_path / "other" / "tensorboard").iterdir()]) == 1


def test_verls_names_are_understood_and_unknown_ones_answered_with_the_nearest():
    cfg = load_config(
        None, ["trainer.logger=['console','wandb']", "trainer.project_name=p", "trainer.experiment_name=e"]
    )
    assert (cfg.trainer.trackers, cfg.trainer.project_name, cfg.trainer.run_name) == (["console", "wandb"], "p", "e")
    check_trackers(cfg.trainer.trackers)
    with pytest.raises(UserError, match="trainer.trackers = 'wandbb' is unknown; did you mean 'wandb'"):
        check_trackers(["tensorboard", "wandbb"])


def test_the_process_gets_the_whole_configuration():
    cfg = load_config("seed", ["rollout.stop=[a]", "trainer.seed=7"])
    assert config_of(json.loads(json.dumps(tracker_process.to_dict(cfg)))) == cfg

"""How programs fail: one paragraph on stderr, exit code 2, nothing left behind."""

import datetime
import json
import os
import signal
import subprocess
import sys

import pytest
from repository import ROOT

from gspo.errors import UserError
from gspo.system.files import write_json
from gspo.system.program import guarded


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rollout.nn=4"], ["'rollout.nn'", "did you mean 'rollout.n'"]),
        (["--config", "{tmp}/no.yaml"], ["{tmp}/no.yaml: No such file", "preset in configs: "]),
        pytest.param(
            ["model.path={tmp}/no_model"], ["model.path = '{tmp}/no_model'", "no folder here"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["data.train_files={tmp}/no.json"], ["data file {tmp}/no.json: No such file"], marks=pytest.mark.slow
        ),
    ],
    ids=["key", "config", "model", "data"],
)
def test_a_users_mistake_is_one_paragraph_and_leaves_nothing(run_program, tmp_path, arguments, said):
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    done = run_program("train.py", *arguments, f"trainer.output_dir={tmp_path}/out")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for part in said:
        assert part.replace("{tmp}", str(tmp_path)) in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("argument", "code"), [("rollout.nn=4", 2), ("optim.lr=much", 2), ("--help", 0)])
def test_what_needs_no_torch_does_not_wait_for_it(run_program, argument, code):
    done = run_program("-X", "importtime", "train.py", argument)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == code and "gspo.read_config" in imported
    assert not {"torch", "numpy", "transformers"} & imported


@pytest.mark.parametrize("rank", ["0", "1"])
def test_all_ranks_exit_with_2_and_the_first_says_why(monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)

    def main():
        raise UserError("the value, the place, the cure")

    with pytest.raises(SystemExit) as e:
        guarded(main)
    assert e.value.code == 2
    assert capsys.readouterr().err == ("error: the value, the place, the cure\n" if rank == "0" else "")


def test_guarded_shows_the_traceback_of_a_bug():
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)
    assert guarded(lambda: None) is None


def test_ctrl_c_is_one_line_and_exit_code_130():
    program = "import time\nfrom gspo.system.program import guarded\n"
    program += "guarded(lambda: print('ready', flush=True) or time.sleep(60))"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert err.strip() == "interrupted"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_program_prints_what_the_terminal_cannot_show(encoding):
    """Half a character in any encoding, and in ASCII every other one."""
    program = "from gspo.system.program import guarded\nguarded(lambda: print('7\\ud83d \u89e3'))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8") == ("7\\ud83d 解\n" if encoding == "utf-8" else "7\\ud83d \\u89e3\n")


@pytest.mark.parametrize("value", ["7\ud83d", ["\udcff"], {"\ud83d": 1}, {"day": datetime.date(2026, 11, 29)}])
def test_a_file_takes_half_a_character_and_a_date(tmp_path, value):
    write_json(tmp_path / "x.json", value)
    read = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert read == (value if "day" not in value else {"day": "2026-11-29"})

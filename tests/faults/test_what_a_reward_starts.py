"""Nothing that a reward function has started outlives its process, and it is handed no secrets."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import wait_until
from repository import ROOT

from gspo.config import Reward
from gspo.errors import UserError
from gspo.reward import guardian
from gspo.reward.scorer import Scorer
from gspo.reward.worker_handle import Settings
from gspo.reward.worker_pool import WorkerPool

PATIENCE_S = 120
pytestmark = pytest.mark.skipif(not guardian.available(), reason="needs Linux")
NOTE = "open(os.path.join(FOLDER, str(os.getpid())), 'w').close()"
# How a process is started that should be there for ten minutes; it notes its number in FOLDER.
STARTS = {
    "a child": f"if os.fork() == 0:\n        {NOTE}; time.sleep(600)",
    "a session": f"if os.fork() == 0:\n        os.setsid(); {NOTE}; time.sleep(600)",
    "a daemon": (
        f"if os.fork() == 0:\n        os.setsid()\n        if os.fork(): os._exit(0)\n        {NOTE}; time.sleep(600)"
    ),
    "a deaf daemon": (
        "if os.fork() == 0:\n        os.setsid(); [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]\n"
        f"        if os.fork(): os._exit(0)\n        {NOTE}; os.closerange(0, 100); time.sleep(600)"
    ),
    "a shell": (
        "subprocess.Popen(f'(setsid sh -c \"echo > {FOLDER}/\\\\$\\\\$; exec sleep 600\" &)', shell=True, env={})"
    ),
    "what starts again": (
        "if os.fork() == 0:\n        os.setsid()\n        while True:\n"
        f"            if os.fork() == 0:\n                {NOTE}; time.sleep(600)\n            time.sleep(0.02)"
    ),
}
ENDS = {
    "a time limit": ("time.sleep(600)", "timeout"),
    "an exit": ("os._exit(3)", "error"),
    "a kill": ("os.kill(os.getpid(), 9)", "error"),
    "a crash": ("ctypes.string_at(0)", "error"),
}
FUNCTION = """import ctypes, os, signal, subprocess, sys, time
FOLDER = {folder!r}
def compute_score():
    {start}
    while not os.listdir(FOLDER): time.sleep(0.005)
    {end}
"""


def write(folder, start, end):
    (folder / "started").mkdir()
    (folder / "r.py").write_text(FUNCTION.format(folder=str(folder / "started"), start=STARTS[start], end=end))
    return str(folder / "r.py")


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def left(folder):
    return [pid for pid in os.listdir(folder / "started") if runs(pid)]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("end", ENDS)
def test_it_ends_with_the_process(tmp_path, start, end):
    how, fault = ENDS[end]
    pool = WorkerPool(Settings(write(tmp_path, start, how), "compute_score", timeout_s=0.5), 1)
    assert pool.submit({}).result(PATIENCE_S).fault == fault
    assert os.listdir(tmp_path / "started") and left(tmp_path) == []
    pool.close()


@pytest.mark.parametrize("start", ["a deaf daemon", "what starts again"])
def test_it_ends_with_the_pool_and_with_a_killed_trainer(tmp_path, start):
    path = write(tmp_path, start, "return 1.0")
    pool = WorkerPool(Settings(path, "compute_score"), 1)
    assert pool.submit({}).result(PATIENCE_S).reply["score"] == 1.0
    assert left(tmp_path)
    pool.close()
    assert left(tmp_path) == []
    for note in (tmp_path / "started").iterdir():
        note.unlink()
    program = "from gspo.reward.worker_pool import WorkerPool\nfrom gspo.reward.worker_handle import Settings\n"
    program += f"WorkerPool(Settings({path!r}, 'compute_score'), 1).submit({{}}).result(); print('on'); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    trainer = subprocess.Popen([sys.executable, "-u", "-c", program], cwd=ROOT, text=True, **pipes)
    assert trainer.stdout.readline() == "on\n" and left(tmp_path)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert wait_until(lambda: left(tmp_path) == [], PATIENCE_S)


def test_a_killed_guardian_takes_the_worker_along(tmp_path):
    (tmp_path / "r.py").write_text("import os\ndef compute_score():\n    return {'score': 1.0, 'pid': os.getpid()}\n")
    pool = WorkerPool(Settings(str(tmp_path / "r.py"), "compute_score"), 1)
    pid = int(pool.submit({}).result(PATIENCE_S).reply["parts"]["pid"])
    assert pid != pool.threads[0].process.process.pid
    pool.threads[0].process.process.kill()
    assert wait_until(lambda: not runs(pid), PATIENCE_S)
    assert pool.submit({}).result(PATIENCE_S).reply["score"] == 1.0
    pool.close()


def test_secrets_of_the_environment_are_not_handed_over_unless_named(tmp_path, monkeypatch, capsys):
    for name in (
        "MY_TOKEN",
        "my_api_key",
        "DB_PASSWORD_2",
        "A_SECRET",
        "JUDGE_KEY",
        "KEYBOARD",
        "TOKENIZERS_PARALLELISM",
    ):
        monkeypatch.setenv(name, "x")
    (tmp_path / "r.py").write_text(
        "import os\nhas = {k: 1 for k, v in os.environ.items() if v == 'x'}\n"
        "def compute_score(**_):\n    return {'score': 1.0, **has}\n"
    )
    scorer = Scorer(Reward(path=str(tmp_path / "r.py"), workers=1, env=["JUDGE_KEY"]))
    reply = scorer.pool.submit({"solution_str": ""}).result(PATIENCE_S).reply
    scorer.close()
    assert set(reply["parts"]) == {"JUDGE_KEY", "KEYBOARD", "TOKENIZERS_PARALLELISM"}
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "A_SECRET, DB_PASSWORD_2, MY_TOKEN, my_api_key" in said and "reward.env" in said


def test_a_name_in_reward_env_that_is_not_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="reward.env names 'NO_SUCH_KEY', which is not set"):
        Scorer(Reward(env=["NO_SUCH_KEY"]))

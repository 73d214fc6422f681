"""Of several ranks that fail, one says why: first in this process, with torch's own store, then with real ranks."""

import pytest
import torch.distributed as dist
from repository import PROGRAM_ENV, ROOT

from gspo.distributed import failures
from gspo.errors import UserError

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:54003"


@pytest.fixture()
def leave(monkeypatch, capsys):
    """End ranks in the given order -> what each printed, and its exit code."""
    store = dist.HashStore()
    monkeypatch.setattr(failures, "WAIT_S", 0.05)
    monkeypatch.setattr(failures, "end_process", lambda code: (_ for _ in ()).throw(SystemExit(code)))

    def leave(rank, error):
        with pytest.raises(SystemExit) as e:
            failures.leave(error, store, rank)
        return capsys.readouterr().err, e.value.code

    return leave


def test_the_rank_that_fails_says_why_and_the_others_nothing(leave):
    assert leave(1, UserError("the value, the place, the cure")) == (
        "rank 1: error: the value, the place, the cure\n",
        2,
    )
    assert leave(0, RuntimeError(GLOO)) == ("", 2)
    assert leave(2, dist.DistBackendError("NCCL communicator was aborted")) == ("", 2)


def test_of_ranks_that_fail_alike_the_first_speaks_once(leave):
    assert leave(0, UserError("no such file")) == ("error: no such file\n", 2)
    assert leave(1, UserError("no such file")) == ("", 2)
    assert leave(3, UserError("another one")) == ("rank 3: error: another one\n", 2)


def test_ranks_that_fail_alike_without_the_first_speak_once(leave):
    assert leave(2, UserError("no judge")) == ("rank 2: error: no judge\n", 2)
    assert leave(1, UserError("no judge")) == ("", 2)


def test_a_bug_shows_one_traceback(leave):
    said, code = leave(1, ZeroDivisionError("division by zero"))
    assert said.startswith("rank 1: error:\n") and said.endswith("ZeroDivisionError: division by zero\n") and code == 1
    assert leave(2, ZeroDivisionError("division by zero")) == ("", 1)
    assert leave(0, RuntimeError(GLOO)) == ("", 1)


def test_a_rank_that_was_killed_is_missed_in_one_line(leave):
    said, code = leave(1, RuntimeError(GLOO))
    assert said.count("\n") == 1 and "has ended without saying why" in said and "Connection closed by peer" in said
    assert code == 1 and leave(0, RuntimeError(GLOO)) == ("", 1)


def test_a_store_that_is_gone_keeps_nobody_from_speaking(leave, monkeypatch):
    def gone(self, *args):
        raise dist.DistNetworkError("the server has ended")

    for name in ("check", "get", "add", "compare_set"):
        monkeypatch.setattr(dist.HashStore, name, gone)
    assert leave(1, UserError("the cure")) == ("rank 1: error: the cure\n", 2)


# ---- whole runs ----

ONE_STEP = ("--config", "configs/quick.yaml", "trainer.max_steps=1", "data.train_batch_size=4", "reward.workers=1",
            "eval.before_and_after=false", "eval.round_prompts=0", "rollout.max_new_tokens=8", "reward.check_rows=0",
            "optim.learning_rate=3e-4")  # fmt: skip
ON_RANK_1 = """
import os
def parent_of(pid):
    return int(open("/proc/" + str(pid) + "/stat").read().rpartition(")")[2].split()[1])
def compute_score(**given):
    if os.environ.get("RANK") == "1":
        {what}
    return 0.5
"""
WRONG_STARTS = {
    "key": (["rollout.nn=4"], "did you mean 'rollout.n'"),
    "model": (["model.path={tmp}/no_model"], "no_model' is no folder here"),
    "data": (["data.train_files={tmp}/no.json"], "no.json: No such file"),
    "rows": (["data.train_files={tmp}/rows.json"], "rows.json, row 1: field 'ground_truth'"),
    "reward": (["reward.path={tmp}/reward.py"], "reward.py does not import: SyntaxError"),
}
FILES = {"rows.json": '[{"prompt": "1 + 1?"}]', "reward.py": "def compute_score(:\n"}


def run(run_program, ranks, tmp_path, *overrides):
    """Start train.py on so many ranks, from a folder of files."""
    launcher = ["gspo/distributed/start_ranks.py", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    given = [x.replace("{tmp}", str(tmp_path)) for x in overrides]
    return run_program(
        *launcher, ROOT / "train.py", *ONE_STEP, f"trainer.output_dir={tmp_path}/out", *given, env=PROGRAM_ENV
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("what", WRONG_STARTS)
def test_the_whole_of_a_wrong_start_is_one_paragraph(run_program, tmp_path, what, ranks):
    overrides, said = WRONG_STARTS[what]
    done = run(run_program, ranks, tmp_path, *overrides)
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr and done.returncode == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said", "code"),
    [
        ("raise RuntimeError('no judge')", "rank 1: error: {tmp}/judge.py: compute_score raised RuntimeError", 2),
        ("return 'x'", "rank 1: error: {tmp}/judge.py: compute_score returned 'x'; it must return a finite number", 2),
        ("os.kill(parent_of(os.getppid()), 9)", "the process of rank 1 was ended by SIGKILL", 1),  # past its guardian
    ],
    ids=["raises", "no score", "kills its rank"],
)  # fmt: skip
def test_an_error_on_another_rank_than_the_first_is_shown_and_nothing_else(run_program, tmp_path, what, said, code):
    (tmp_path / "judge.py").write_text(ON_RANK_1.format(what=what))
    done = run(run_program, 2, tmp_path, f"reward.path={tmp_path}/judge.py", "reward.on_error=stop")
    assert said.replace("{tmp}", str(tmp_path)) in done.stderr and done.returncode == code
    assert "Traceback" not in done.stderr + done.stdout
    lines = done.stderr.splitlines()
    # A killed rank: by what it was ended, and the other one misses it or was ended by the launcher.
    assert len(lines) == (1 if code == 2 else 2), done.stderr

"""Whatever a reward function does, every call gets an outcome; and a run that waits says so and can be ended."""

import signal
import subprocess
import sys
import threading
import time

import pytest
from repository import ROOT

from gspo.config import Reward
from gspo.errors import UserError
from gspo.read_config import load_config
from gspo.reward import scorer, worker_pool
from gspo.reward.scorer import Scorer
from gspo.reward.worker_handle import Settings
from gspo.reward.worker_pool import GAVE_UP, WorkerPool
from gspo.types import Prompt

PATIENCE_S = 120
# Each is the body of a function that is called with `text`; on other texts it returns 0.5.
FORKS = {
    "returns": "if os.fork() == 0: return 1.0",
    "raises": "if os.fork() == 0: raise ValueError('child')",
    "exits": "if os.fork() == 0: sys.exit(0)",
    "sleeps": "if os.fork() == 0: time.sleep(600)",
    "forks again": "if os.fork() == 0 and os.fork() == 0: return 1.0",
}
WRITE = "os.write(int(sys.argv[1]), {!r})"


def framed(text):
    return len(text).to_bytes(4, "big") + text


GARBAGE = {  # what is written to the channel: the fault of that call; "": its own reply counts
    "a line of text": (b"hello, world\n", "wrote to the file descriptor"),
    "no JSON": (framed(b"hello"), "wrote to the file descriptor"),
    "no text": (framed(b"\xff\xfe"), "wrote to the file descriptor"),
    "a list": (framed(b"[1, 2]"), "wrote to the file descriptor"),
    "nested": (framed(b"[" * 5000 + b"]" * 5000), "wrote to the file descriptor"),
    "another call's": (framed(b'{"index": 77, "score": 1.0, "parts": {}, "pred": null}'), ""),
    "no index": (framed(b'{"score": 1.0}'), ""),
    "a list as index": (framed(b'{"index": [1], "score": 1.0}'), ""),
    "no score": (framed(b'{"index": 1}'), ""),
    "no fault": (framed(b'{"index": 1, "fault": "x"}'), ""),
    "a text as score": (framed(b'{"index": 1, "score": "x", "parts": {}, "pred": null}'), ""),
    # The first call with the text "bad" is the second one.
    "a score too large": (framed(b'{"index": 2, "score": 1e300, "parts": {}, "pred": null}'), ""),
    "no number as score": (framed(b'{"index": 2, "score": NaN, "parts": {}, "pred": null}'), ""),
    "a number too large": (framed(b'{"index": 2, "score": 1.0, "parts": {"a": 1%s}, "pred": null}' % (b"0" * 400)), ""),
    "a list as answer": (framed(b'{"index": 2, "score": 1.0, "parts": {}, "pred": [1]}'), ""),
    "no answer": (framed(b'{"index": 2, "score": 1.0, "parts": {}}'), ""),
    "a fault of lists": (framed(b'{"index": 2, "fault": {"kind": [], "message": [], "trace": []}}'), ""),
    "a group's scores": (framed(b'{"index": 2, "score": 1.0, "scores": [1.0], "parts": {}, "pred": null}'), ""),
}


@pytest.fixture()
def pool(tmp_path):
    made = []

    def pool(body, kind="def", **settings):
        path = tmp_path / "my_reward.py"
        function = kind + " compute_score(text):\n    if text == 'bad':\n        {}\n    return 0.5\n"
        path.write_text("import os, sys, time\n" + function.format(body))
        made.append(WorkerPool(Settings(str(path), "compute_score", **settings), 1))
        return made[-1]

    yield pool
    for each in made:
        each.close()


def outcomes(p, texts=("", "bad", "", "bad", "")):
    return [future.result(PATIENCE_S) for future in [p.submit({"text": text}) for text in texts]]


@pytest.mark.parametrize("how", FORKS)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_forked_process_does_not_answer(pool, how, kind):
    p = pool(FORKS[how], kind)
    assert [(o.fault, o.reply.get("score")) for o in outcomes(p)] == [("", 0.5)] * 5


def test_a_process_that_ends_is_noticed_though_its_child_lives(pool):
    """The child holds every file descriptor of its parent, for ten minutes."""
    p = pool("if os.fork() == 0: time.sleep(600)\n        os._exit(3)", timeout_s=60.0)
    assert [o.message for o in outcomes(p)] == ["", *["ended its process with exit code 3", ""] * 2]


@pytest.mark.parametrize("kind", GARBAGE)
def test_foreign_bytes_on_the_channel_cost_at_most_their_own_call(pool, kind):
    data, said = GARBAGE[kind]
    found = outcomes(pool(WRITE.format(data)))
    assert [o.message[: len(said)] for o in found] == ["", said, "", said, ""]
    assert [o.reply.get("score") for o in found] == [0.5, *[None if said else 0.5, 0.5] * 2]


def test_scores_of_a_group_of_another_size_are_that_groups_fault(tmp_path):
    source = "import os, sys\ndef rank_responses(responses, ground_truth, data_source):\n    "
    source += (
        WRITE.format(framed(b'{"index": 1, "scores": [{"score": 1.0, "parts": {}, "pred": null}]}'))
        + "\n    return []\n"
    )
    (tmp_path / "r.py").write_text(source)
    s = Scorer(Reward(path=str(tmp_path / "r.py"), workers=1))
    found = s.score_texts([Prompt(0, (1,), "q", "7", "", {})], [["a", "b"]])
    s.close()
    assert found.rewards.tolist() == [[0.0, 0.0]] and "sent scores of another group's size" in found.first_fault


def test_arguments_that_cannot_be_sent_are_that_calls_fault(pool):
    nested = 1
    for _ in range(600):
        nested = {"a": nested}
    found = outcomes(pool("pass"), ("", threading.Lock(), nested, ""))
    assert [o.kind for o in found] == ["", "arguments", "arguments", ""]
    assert "cannot be sent (RecursionError" in found[2].message and "_thread.lock" in found[1].message


def test_a_time_limit_that_no_clock_can_hold_is_a_fault_and_refused_in_a_configuration(pool):
    assert all(o.fault for o in outcomes(pool("pass", timeout_s=1e300), [""]))
    with pytest.raises(UserError, match=r"reward.timeout_s.*1e\+300"):
        load_config(None, ["reward.timeout_s=1e300"])


# ---- what the system has no room for ----

FEW_FILES = """
import resource, sys
from gspo.reward.worker_pool import WorkerPool
from gspo.reward.worker_handle import Settings
said = []
pool = WorkerPool(Settings(sys.argv[1], "compute_score"), 40, said.append)
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
futures = [pool.submit({"text": ""}) for _ in range(200)]
print({future.result(100).reply["score"] for future in futures}, pool.workers < 40)
print(*said)
pool.close()
"""


def test_with_too_few_file_descriptors_fewer_processes_work(pool):
    path = pool("pass").settings.path
    done = subprocess.run([sys.executable, "-c", FEW_FILES, path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("{0.5} True\n") and "Too many open files): raise `ulimit -n`" in done.stdout, done


def test_without_one_file_descriptor_the_pool_is_refused(pool):
    path = pool("pass").settings.path
    program = FEW_FILES.replace("said = []", "said = []\nresource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))")
    done = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, text=True)
    assert "UserError: no process for the reward function can be started ([Errno 24]" in done.stderr


def test_calls_are_given_up_where_no_process_can_be_started_any_more(pool, monkeypatch):
    p = pool("os._exit(1)")
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    monkeypatch.setattr(worker_pool, "PAUSES_S", (0.01, 0.01))
    found = outcomes(p)
    assert [o.kind for o in found] == ["", *[GAVE_UP] * 4] and "No such file" in found[1].message
    monkeypatch.undo()
    assert outcomes(p, [""])[0].reply["score"] == 0.5, "and later, when it can be, it is"


# ---- waiting ----


def test_a_line_says_what_is_waited_for(tmp_path, monkeypatch, capsys):
    (tmp_path / "slow.py").write_text("import time\ndef compute_score(**_):\n    time.sleep(0.5)\n    return 1.0\n")
    monkeypatch.setattr(scorer, "WATCH_S", 0.2)
    s = Scorer(Reward(path=str(tmp_path / "slow.py"), workers=1))
    prompt = Prompt(id=0, ids=[1], text="the prompt", ground_truth="", data_source="", extra_info={})
    s.score_texts([prompt], [["the response", "another"]])
    s.close()
    said = capsys.readouterr().err
    assert (
        said.startswith("has waited 0 s for ")
        and "on the response 'the response' to the prompt 'the prompt'; 1 " in said
    )


WAITS = "SIGTERM: the step is finished and saved first; another SIGTERM or Ctrl-C ends the run at once\n"
STUCK = """
import ctypes, sys, threading, time
from gspo.system import preemption
preemption.REPEATED_S = 0.05
p = preemption.Preemption()
steps = p.finishing_steps()
steps.__enter__()
print("ready", flush=True)
if sys.argv[1] == "Python":
    while not p.signal_name: time.sleep(0.01)
    print("asked by", p.signal_name, file=sys.stderr, flush=True)
    threading.Event().wait()
mutex = ctypes.create_string_buffer(64)  # a library waits for what never comes: no handler of Python's runs
for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("where", ["Python", "a library"])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_request_to_end_ends_the_process(where, second):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", STUCK, where], cwd=ROOT, text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == WAITS, "the first one is only a request"
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(second)
    out, err = process.communicate(timeout=PATIENCE_S)
    by_hand = where == "Python" and second == signal.SIGINT
    assert process.returncode == 128 + second or by_hand, (out, err)
    assert where != "Python" or "asked by SIGTERM" in err
    assert f"{second.name} came again: ended at once" in err or by_hand


def test_a_signal_sent_twice_at_once_is_one_request():
    """As `timeout` does: to the process, and to its group."""
    program = STUCK.replace("0.05", "3.0").replace("threading.Event().wait()", "time.sleep(1); sys.exit(7)")
    process = subprocess.Popen([sys.executable, "-c", program, "Python"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == WAITS
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 7


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_ends_a_run_at_once_when_there_is_no_step_to_finish(name, when):
    """Its first evaluation may take hours, and nothing of it is lost by ending."""
    other = {"before": "", "after": "steps.__enter__()\nsteps.__exit__(None, None, None)"}[when]
    program = STUCK.replace("steps.__enter__()", other)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program, "a library"], cwd=ROOT, text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + getattr(signal, name)
    assert err == f"{name}: ended at once, as there is no step to finish\n"

"""A reward function that does its worst costs its own call and nothing else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import wait_until
from repository import ROOT

from gspo.errors import UserError
from gspo.reward import worker_handle
from gspo.reward.worker_handle import Settings
from gspo.reward.worker_pool import WorkerPool

CHAOS = """
import ctypes, os, subprocess, sys, time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    match solution_str.split():
        case ["hang"]: time.sleep(1000)
        case ["compute"]: 9**9**9  # one instruction that holds the interpreter's lock for minutes
        case ["raise"]: raise ValueError("no")
        case ["exit"]: os._exit(3)
        case ["sysexit"]: sys.exit(1)
        case ["crash"]: ctypes.string_at(0)
        case ["kill"]: os.kill(os.getpid(), 9)
        case ["memory"]: bytearray(50 << 30)
        case ["print"]: print("x" * 10_000_000)
        case ["close"]: os.closerange(0, 100)
        case ["nan"]: return float("nan")
        case ["none"]: return None
        case ["text"]: return "1.0"
        case ["recurse"]: return compute_score(data_source, solution_str, ground_truth)
        case ["pid"]: return {"score": 1.0, "pid": os.getpid()}
        case ["number", x]: return float(x)
    return 1.0
"""
PATIENCE_S = 120  # for what takes a fraction of a second on a machine that does nothing else
OLDER: set[str] = set()  # processes that were there before: the default reward keeps one
FAULTS = {
    "hang": ("timeout", "took longer than 2 s (line 6)"),
    "compute": ("timeout", "took longer than 2 s (line 7)"),
    "raise": ("error", "raised ValueError: no (line 8)"),
    "exit": ("error", "ended its process with exit code 3"),
    "sysexit": ("error", "raised SystemExit: 1 (line 10)"),
    "crash": ("error", "ended its process by SIGSEGV"),
    "kill": ("error", "ended its process by SIGKILL"),
    "memory": ("error", "raised MemoryError:  (line 13); reward.memory_gib = 4 is the limit"),
    "close": ("error", "ended its process"),
    "nan": ("error", "returned nan; it must return a finite number"),
    "none": ("error", "returned None; it must"),
    "text": ("error", "returned '1.0'; it must"),
    "recurse": ("error", "raised RecursionError"),
}


@pytest.fixture()
def pool(tmp_path):
    """Make a pool from the text of a file."""
    made = []
    OLDER.clear()
    OLDER.update(pid for pid, _ in children())

    def pool(text=CHAOS, workers=1, printed=lambda text: None, **settings):
        path = tmp_path / "my_reward.py"
        path.write_text(text)
        settings = Settings(str(path), "compute_score", **{"timeout_s": 2.0, **settings})
        made.append(WorkerPool(settings, workers, printed))
        return made[-1]

    yield pool
    for each in made:
        each.close()


def call(pool, text):
    return pool.submit({"data_source": "", "solution_str": text, "ground_truth": ""})


def children():
    """Processes that the test started and that are still there, zombies included."""
    mine = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and entry.parent.name not in OLDER:
            mine.append((entry.parent.name, fields[0]))
    return mine


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_fails_only_its_own_call(pool, workers):
    p = pool(workers=workers)
    asked = [(text, call(p, text)) for fault in FAULTS for text in ("number 0.25", fault, "number 0.75")]
    for text, future in asked:
        outcome = future.result(PATIENCE_S)
        if text in FAULTS:
            fault, said = FAULTS[text]
            assert outcome.fault == fault and outcome.message.startswith(said), (text, outcome)
        else:
            assert outcome.fault == "" and outcome.reply["score"] == float(text.split()[1])
    assert len(children()) <= workers and all(state != "Z" for _, state in children())
    p.close()
    assert children() == []


def test_a_long_print_is_no_fault_and_is_not_kept_in_memory(pool):
    seen = []
    p = pool(printed=lambda text: seen.append(len(text)))
    assert all(call(p, "print").result(PATIENCE_S).reply["score"] == 1.0 for _ in range(3))
    assert sum(seen) == 3 * 10_000_001 and max(seen) <= 1 << 16


def test_a_call_that_raises_keeps_its_process_and_its_traceback(pool):
    p = pool()
    first = call(p, "pid").result(PATIENCE_S).reply["parts"]["pid"]
    outcome = call(p, "raise").result(PATIENCE_S)
    assert call(p, "pid").result(PATIENCE_S).reply["parts"]["pid"] == first
    assert "line 8, in compute_score" in outcome.trace and outcome.trace.endswith("ValueError: no")
    assert "reward_worker" not in outcome.trace, "the user's frames, not ours"


def test_a_process_out_of_memory_is_replaced(pool):
    p = pool()
    first = call(p, "pid").result(PATIENCE_S).reply["parts"]["pid"]
    call(p, "memory").result(PATIENCE_S)
    assert call(p, "pid").result(PATIENCE_S).reply["parts"]["pid"] != first


def test_faults_are_distinguished_by_kind(pool):
    p = pool()
    kinds = [call(p, text).result(PATIENCE_S).kind for text in ("raise", "raise", "sysexit", "nan", "none", "exit")]
    assert kinds[0] == kinds[1] and len(set(kinds)) == 5


def test_processes_started_by_a_call_end_with_it(pool, tmp_path):
    text = "import subprocess, time\ndef compute_score(**_):\n"
    text += f"    p = subprocess.Popen(['sleep', '600'])\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))\n"
    outcome = call(pool(text + "    time.sleep(600)\n"), "").result(PATIENCE_S)
    assert outcome.fault == "timeout"
    pid = int((tmp_path / "pid").read_text())
    assert wait_until(lambda: not _runs(pid), PATIENCE_S)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("busy", ["time.sleep(600)", pytest.param("9**9**9", marks=pytest.mark.slow)])
def test_a_killed_trainer_leaves_no_process(tmp_path, busy):
    text = (
        f"import os, time\ndef compute_score(**_):\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
    )
    (tmp_path / "r.py").write_text(f"{text}    {busy}\n")
    program = "import time\nfrom gspo.reward.worker_pool import WorkerPool\n"
    program += "from gspo.reward.worker_handle import Settings\n"
    program += f"pool = WorkerPool(Settings({str(tmp_path / 'r.py')!r}, 'compute_score', timeout_s=1), 1)\n"
    program += "pool.submit({}); time.sleep(60)"
    trainer = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    assert wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), PATIENCE_S)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    pid = int((tmp_path / "pid").read_text())
    assert wait_until(lambda: not _runs(pid), PATIENCE_S)


def test_an_import_that_fails_crashes_or_exits_is_an_error(pool):
    for text, said in {
        "import sys\nsys.exit(4)\n": r"does not import: SystemExit: 4 \(line 2\)",
        "import os\nos._exit(4)\n": "importing it ended its process with exit code 4",
        "x = 1\n": "has no function 'compute_score'",
    }.items():
        with pytest.raises(UserError, match=said):
            pool(text)
    assert children() == []


def test_an_import_that_hangs_is_reported_with_its_line(pool, monkeypatch):
    monkeypatch.setattr(worker_handle, "START_S", 1.0)
    with pytest.raises(UserError, match=r"my_reward.py is still being imported after 1 s \(line 2\)"):
        pool("import time\ntime.sleep(600)\n\n\ndef compute_score(**_):\n    return 1.0\n")
    assert children() == []


def test_an_import_that_takes_long_is_said_once(pool, monkeypatch):
    monkeypatch.setattr(worker_handle, "SLOW_START_S", 0.2)
    printed = []
    p = pool("import time\ntime.sleep(0.6)\ndef compute_score(**_):\n    return 1.0\n", printed=printed.append)
    assert len(printed) == 1 and f"its file {p.settings.path} is still being imported" in printed[0]
    p.first.process.kill()
    assert call(p, "").result(PATIENCE_S).reply["score"] == 1.0
    assert "".join(printed).count("imported") == 1, "of the process that took its place nothing is said"


def test_editing_the_file_does_not_change_a_run(pool):
    p = pool("def compute_score(**_):\n    return 0.25\n")
    Path(p.settings.path).write_text("def compute_score(**_):\n    return 0.75\n")
    os.killpg(p.first.process.pid, signal.SIGKILL)
    assert [p.submit({}).result(PATIENCE_S).reply["score"] for _ in range(3)] == [0.25] * 3


def test_a_process_killed_from_outside_loses_no_call(pool):
    p = pool()
    for _ in range(5):
        pid = int(call(p, "pid").result(PATIENCE_S).reply["parts"]["pid"])
        asked = [call(p, "pid") for _ in range(3)]
        os.kill(pid, signal.SIGKILL)
        assert all(f.result(PATIENCE_S).fault == "" for f in asked)


# ---- in parallel ----


def test_two_processes_work_at_the_same_time(pool, tmp_path):
    """Each call waits for a file that the other writes: one after the other they would never end."""
    text = "import os, time\ndef compute_score(mine, other):\n    open(mine, 'w').close()\n"
    text += "    while not os.path.exists(other):\n        time.sleep(0.01)\n    return 1.0\n"
    p, (a, b) = pool(text, workers=2, timeout_s=PATIENCE_S), (str(tmp_path / "a"), str(tmp_path / "b"))
    futures = [p.submit({"mine": a, "other": b}), p.submit({"mine": b, "other": a})]
    assert [f.result(PATIENCE_S).reply["score"] for f in futures] == [1.0, 1.0]


ASYNC = """
import asyncio, os, time
running = most = 0

async def compute_score(solution_str, **_):
    global running, most
    running += 1
    most = max(most, running)
    try:
        if solution_str == "hang": await asyncio.sleep(600)
        if solution_str == "block": time.sleep(600)
        if solution_str == "exit": os._exit(3)
        if solution_str == "raise": raise ValueError("no")
        if solution_str == "sysexit": raise SystemExit(3)
        await asyncio.sleep(0.05)
        return {"score": 0.5, "most": most}
    finally:
        running -= 1
"""


def test_async_calls_share_a_process_up_to_the_limit(pool):
    p = pool(ASYNC, concurrency=5, timeout_s=5)
    assert p.concurrent
    futures = [call(p, "") for _ in range(23)]
    assert max(f.result(PATIENCE_S).reply["parts"]["most"] for f in futures) == 5


@pytest.mark.parametrize(
    ("bad", "fault", "said"),
    [
        ("hang", "timeout", "took longer than 2 s"),
        pytest.param("block", "timeout", "took longer than 2 s (line 11)", marks=pytest.mark.slow),
        ("exit", "error", "ended its process with exit code 3"),
        ("raise", "error", "raised ValueError: no (line 13)"),
        ("sysexit", "error", "raised SystemExit: 3 (line 14)"),
    ],
)
def test_a_fault_among_async_calls_fails_only_its_own_call(pool, bad, fault, said):
    p = pool(ASYNC, concurrency=4)
    asked = [(text, call(p, text)) for text in ["", "", bad, "", "", "", bad, ""]]
    for text, future in asked:
        outcome = future.result(PATIENCE_S)
        assert (outcome.fault, outcome.message) == ((fault, said) if text == bad else ("", "")), (text, outcome)


def test_a_plain_function_may_return_a_coroutine(pool):
    text = "async def later():\n    return 0.5\n\n\ndef compute_score(**_):\n    return later()\n"
    p = pool(text)
    assert not p.concurrent and p.submit({}).result(PATIENCE_S).reply["score"] == 0.5


def test_a_class_with_an_async_call_is_concurrent(pool):
    p = pool("class Judge:\n    async def __call__(self, **_):\n        return 0.5\n\n\ncompute_score = Judge()\n")
    assert p.concurrent and p.submit({}).result(PATIENCE_S).reply["score"] == 0.5


# ---- messages ----


def test_long_and_odd_texts_arrive_unchanged(pool):
    p = pool("def compute_score(a, b):\n    return {'score': float(a == b), 'n': len(a)}\n")
    for text in ("", "x" * 3_000_000, "\ud800\x00\u2028", "中文" * 1000):
        reply = p.submit({"a": text, "b": text}).result(PATIENCE_S).reply
        assert (reply["score"], reply["parts"]["n"]) == (1.0, len(text))


def test_a_message_in_pieces_is_put_together():
    import socket

    from gspo.reward.channel import Channel

    a, b = socket.socketpair()
    whole = Channel(b)
    data = b"\x00\x00\x00\x03abc\x00\x00\x00\x00\x00\x00\x00\x01z"
    got = []
    for i in range(len(data)):
        a.sendall(data[i : i + 1])
        whole.fill()
        while (message := whole.next()) is not None:
            got.append(message)
    assert got == [b"abc", b"", b"z"]
    a.close()
    assert whole.receive() is None

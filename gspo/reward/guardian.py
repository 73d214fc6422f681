"""End everything that a reward function has started, however it was started. Standard library only, Linux only.

The worker process forks before it imports anything of the user's. The parent is the guardian, the child goes on as the
worker. Whatever the worker's descendants do, a new session, a double fork, they stay descendants of the guardian: the
kernel hands it those whose parent has ended (PR_SET_CHILD_SUBREAPER). When the worker ends, when the trainer ends, or
on SIGTERM, the guardian kills all of them, and then ends as the worker did, with its exit code or by its signal.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time

PDEATHSIG, SUBREAPER = 1, 36  # of prctl(2)
SWEEP_S = 10.0  # of killing what starts new processes all the time
PASSED_ON = signal.SIGUSR2  # the trainer asks for the line at which a call hangs


def available() -> bool:
    """Return whether this system has what a guardian needs."""
    return sys.platform == "linux"


def fork_worker(sock: socket.socket) -> None:
    """Return in a new process, the worker; guard it in this one, until the end. `sock`: the worker's end of its
    channel, which closes with the trainer."""
    guardian = os.getpid()
    prctl = ctypes.CDLL(None).prctl
    prctl(SUBREAPER, 1, 0, 0, 0)
    worker = os.fork()
    if worker:
        with contextlib.suppress(BaseException):
            _guard(worker, sock)
        os._exit(1)
    prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != guardian:
        os._exit(1)  # it ended before prctl
    os.setpgid(0, 0)  # a group of its own: to end it does not end the guardian


def _guard(worker: int, sock: socket.socket) -> None:
    """Wait for the end of the worker or the trainer, kill all that is left, and end in the same way."""
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(woken)
    for number in (signal.SIGCHLD, signal.SIGTERM, PASSED_ON):
        signal.signal(number, lambda number, frame: None)
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(sock, select.POLLRDHUP)
    status = _reap(worker)  # it may have ended before there was a handler
    while status is None:
        ready, signals = {fd for fd, _ in poll.poll()}, b""
        with contextlib.suppress(BlockingIOError):
            signals = os.read(wake, 64)
        if PASSED_ON in signals:
            os.kill(worker, PASSED_ON)
        status = _reap(worker)
        if status is None and (signal.SIGTERM in signals or sock.fileno() in ready):
            break
    sweep()
    if status is not None and os.WIFSIGNALED(status):
        with contextlib.suppress(ImportError, OSError, ValueError):
            import resource

            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status) if status is not None else 0)


def _reap(worker: int) -> int | None:
    """Collect the children that have ended; return the worker's status if it is one of them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            found = status if pid == worker else found
    return found


def sweep() -> None:
    """Kill all descendants of this process, until there are none."""
    until = time.monotonic() + SWEEP_S
    while time.monotonic() < until:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return  # who has no children has no descendants: orphans become children
        time.sleep(0.002)


def descendants(ancestor: int) -> list[int]:
    """Return the processes below one, parents before their children."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
    found = [ancestor]
    for pid in found:
        found += children.pop(pid, [])
    return found[1:]

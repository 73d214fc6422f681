"""What the programs share: the way they fail, and the way they end."""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable

from gspo.errors import UserError
from gspo.system.torchrun import agent_address, is_main, world_size


def guarded(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Run a program: a user's mistake is one paragraph on stderr and exit code 2, Ctrl-C one line and 130."""
    try:
        end_with_torchrun()
        main()
        leave()
    except UserError as e:
        if is_main():
            print(f"error: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        if is_main():
            print(f"\n{interrupted}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)


def end_with_torchrun() -> None:
    """A process that torchrun started ends when torchrun does, however that ends: left behind, it would train on,
    beside the one that takes its place."""
    address = agent_address()
    if address is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    try:  # torchrun may have ended before that line, while we imported; its store, then, is gone as well
        socket.create_connection(address, 60).close()
    except OSError:
        sys.exit("the torchrun that started this process has ended")


def leave() -> None:
    """End a process of several at once: while the interpreter tears down, gloo's threads now and then abort it."""
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

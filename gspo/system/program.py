"""Run a program's main function: report its errors, and end its process in the right way."""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable

from gspo.errors import UserError
from gspo.system.output import kept_output
from gspo.system.torchrun import agent_address, is_main, world_size


def guarded(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Run `main`. UserError: one paragraph on stderr and exit code 2. Ctrl-C: one line and exit code 130."""
    with kept_output():
        try:
            end_with_torchrun()
            main()
            end_process()
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
    """Have the kernel end this process when the torchrun that started it ends, however that ends.

    Otherwise it would train on, beside the process that takes its place.
    """
    address = agent_address()
    if address is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    try:  # torchrun may have ended before prctl, during our imports; then its store is gone as well
        socket.create_connection(address, 60).close()
    except OSError:
        sys.exit("the torchrun that started this process has ended")


def end_process(code: int = 0) -> None:
    """End this process at once if the run has several: gloo's threads sometimes abort an interpreter's normal exit."""
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

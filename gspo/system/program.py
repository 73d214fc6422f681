"""Run a program's main function: report its errors, and end its process in the right way."""

import ctypes
import errno
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gspo.errors import UserError
from gspo.system.language import translate_help, translated
from gspo.system.output import kept_output
from gspo.system.torchrun import agent_address, is_main, world_size


def guarded(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Run `main`. A user's mistake ends the program as `mistakes_said` does; Ctrl-C with one line and exit code 130."""
    with kept_output():
        try:
            with mistakes_said():
                end_with_torchrun()
                main()
                end_process()
        except KeyboardInterrupt:
            if is_main():
                print(f"\n{translated(interrupted)}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(130)


@contextmanager
def mistakes_said() -> Iterator[None]:
    """End the program at a UserError, or an error of the system with a file: one paragraph on stderr, exit code 2."""
    translate_help()
    try:
        yield
    except UserError as e:
        if is_main():
            print(translated(f"error: {e}"), file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as e:
        if not (text := failed_file(e)):
            raise
        if is_main():
            print(translated(text), file=sys.stderr, flush=True)
        sys.exit(2)


def failed_file(error: Exception) -> str:
    """Return one paragraph for an error of the system with a file, or of a limit of it; "" for any other error.

    It names the line of ours at which it came.
    """
    limits = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
    if not isinstance(error, OSError) or (error.filename is None and error.errno not in limits):
        return ""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in f.filename]
    where = f"{os.path.relpath(ours[-1].filename)}, line {ours[-1].lineno}" if ours else "before the start"
    what = f"{os.fsdecode(error.filename)!r:.300}: " if isinstance(error.filename, str | bytes) else ""
    return f"error: {what}{error.strerror or error} ({where})."


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

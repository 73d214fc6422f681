"""Start the processes of a run as torchrun does, with its arguments, and end with the exit code of the one that failed.

    python gspo/distributed/start_ranks.py --standalone --nproc_per_node=8 train.py ...

torchrun itself follows every failure with a log and a traceback of its own and exits with 1, so that a user's mistake,
one paragraph, is hard to find. Nothing of gspo is imported here: this file is run by its path.
"""

import logging
import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

QUIET = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which says so at length; ranks set their threads
    for name in QUIET:
        logging.getLogger(name).addFilter(lambda record: False)
    try:
        run.main()
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        print(f"error: the process of rank {rank} was ended by {name}.", file=sys.stderr, flush=True)
        sys.exit(1)
    except SignalException as e:
        sys.exit(128 + e.sigval)


if __name__ == "__main__":
    main()

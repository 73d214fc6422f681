"""Fail at the first attempt, and start rank 0 late at the second, under `torchrun --max-restarts=1`."""

import json
import os
import sys
import time
from pathlib import Path

from gspo.distributed.world import process_group
from gspo.system.program import end_process

if __name__ == "__main__":
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    time.sleep(5.0 if attempt and rank == 0 else 0.0)
    with process_group() as world:
        ranks = world.sum(1)
        if attempt == 0:
            os._exit(1)
        if world.is_main:
            Path(sys.argv[1]).write_text(json.dumps({"attempt": attempt, "ranks": ranks}))
    end_process()

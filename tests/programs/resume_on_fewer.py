"""Train and save on four ranks, then resume on three, two and one. Started by test_resume_on_fewer_ranks.py.

torchrun --nproc_per_node=4 tests/programs/resume_on_fewer.py FOLDER
"""

import os
import shutil
import socket
import sys
import time
from pathlib import Path

from gspo.distributed.world import process_group
from gspo.read_config import load_config
from gspo.system.files import write_text
from gspo.system.program import end_process
from train import train

FEW = ("data.train_batch_size=7", "eval.before_and_after=false", "eval.round_prompts=0", "trainer.save_freq=1",
       "optim.learning_rate=1e-3", "selfplay.rounds=1", "reward.workers=1", "reward.check_rows=0")  # fmt: skip


def run(folder: Path, ranks: int, steps: int) -> None:
    """One run on the first `ranks` of our processes; the others wait for its end."""
    done, port = folder / "done", folder / "port"
    if os.environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            write_text(port, str(free.getsockname()[1]))
    wait_for(port)
    if int(os.environ["RANK"]) < ranks:
        # A process group of its own for each run, not torchrun's, which has seen four ranks.
        own = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": port.read_text()}
        os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), **own}
        cfg = load_config("configs/quick.yaml", [*FEW, f"trainer.max_steps={steps}", f"trainer.output_dir={folder}"])
        with process_group() as world:
            train(cfg, world)
            if world.is_main:
                done.touch()
    wait_for(done)


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.05)


def main() -> None:
    folder = Path(sys.argv[1])
    is_main = os.environ["RANK"] == "0"
    (folder / "4").mkdir(exist_ok=True)
    run(folder / "4", 4, 3)
    for name in ("3", "2", "1", "2-damaged"):
        if is_main:
            shutil.copytree(folder / "4", folder / "copy", symlinks=True)
            for file in ("done", "port"):
                (folder / "copy" / file).unlink()
            shutil.rmtree(folder / "copy/quick/checkpoints/step_000003")  # as if the run had ended before
            if name == "2-damaged":
                file = folder / "copy/quick/checkpoints/step_000002/trainer/optimizer-00002-of-00004.safetensors"
                data = bytearray(file.read_bytes())
                data[-9] ^= 1
                file.write_bytes(data)
            (folder / "copy").rename(folder / name)
        wait_for(folder / name)
        run(folder / name, int(name[0]), 3)


if __name__ == "__main__":
    main()
    end_process()

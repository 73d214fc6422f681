"""A program for test_sharded_checkpoint.py: four ranks train and save; then three, two and one go on from that.

torchrun --nproc_per_node=4 tests/resume_on_fewer.py FOLDER
"""

import os
import shutil
import sys
import time
from pathlib import Path

from gspo.cli import leave
from gspo.config import load_config
from gspo.distributed import session
from train import train

FEW = ("data.train_batch_size=7", "eval.before_and_after=false", "eval.round_prompts=0", "trainer.save_freq=1",
       "optim.learning_rate=1e-3", "reward.workers=1", "reward.check_rows=0")  # fmt: skip


def run(folder: Path, ranks: int, steps: int) -> None:
    """One run on the first `ranks` of our processes; the others wait for its end."""
    done = folder / "done"
    if int(os.environ["RANK"]) < ranks:
        os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        cfg = load_config("configs/quick.yaml", [*FEW, f"trainer.max_steps={steps}", f"trainer.output_dir={folder}"])
        with session() as world:
            train(cfg, world)
            if world.is_main:
                done.touch()
    while not done.exists():
        time.sleep(0.05)


def main() -> None:
    folder = Path(sys.argv[1])
    is_main = os.environ["RANK"] == "0"
    run(folder / "4", 4, 2)
    for attempt, name in enumerate(("3", "2", "1", "2-damaged"), 1):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)  # a store of their own for each run's ranks
        if is_main:
            shutil.copytree(folder / "4", folder / "copy", symlinks=True)
            (folder / "copy" / "done").unlink()
            if name == "2-damaged":
                file = folder / "copy/quick/checkpoints/step_000002/trainer/optimizer-00002-of-00004.safetensors"
                data = bytearray(file.read_bytes())
                data[-9] ^= 1
                file.write_bytes(data)
            (folder / "copy").rename(folder / name)
        while not (folder / name).exists():
            time.sleep(0.05)
        run(folder / name, int(name[0]), 3)


if __name__ == "__main__":
    main()
    leave()

"""A run with one step of AdamW behind it, for the tests of its folder and its checkpoints."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gspo.algorithm.update import make_optimizer
from gspo.checkpoint.checkpoints import Checkpoints, State
from gspo.checkpoint.run_folder import open_run
from gspo.config import Config
from gspo.distributed.world import World
from gspo.models.loading import load_model
from gspo.read_config import load_config

ALONE = World(0, 1, torch.device("cpu"), None)
ORDER = {  # as `Batches.state` returns it
    "at": torch.tensor([0, 1]),
    "due": torch.tensor([3, 1], dtype=torch.int32),
    "streak": torch.tensor([1, 0], dtype=torch.int8),
    "mean": torch.tensor([0.5, float("nan")]),
    "best": torch.tensor([1.0, float("nan")]),
}


@dataclass
class SavedRun:
    cfg: Config
    folder: Path
    policy: nn.Module
    optimizer: torch.optim.Optimizer
    opponent: nn.Module
    checkpoints: Checkpoints

    def save(self, step: int, **state) -> Path:
        """`step_<step>`, written; where it is, or would be."""
        self.begin(step, **state)
        self.checkpoints.finish()
        return self.folder / "checkpoints" / f"step_{step:06d}"

    def begin(self, step: int, at_once: bool = False, **state) -> None:
        files, frozen = {"order": ORDER}, {"opponent": self.opponent}
        self.checkpoints.save(State(step=step, **state), self.policy, self.optimizer, frozen, files, at_once)

    def names(self) -> list[str]:
        return sorted(p.name for p in (self.folder / "checkpoints").iterdir())


def a_run(output_dir: Path, tokenizer, *overrides: str) -> SavedRun:
    cfg = load_config("configs/quick.yaml", [f"trainer.output_dir={output_dir}", *overrides])
    folder, _ = open_run(cfg, ALONE)
    policy, opponent = load_model(None), load_model(None)
    optimizer = make_optimizer(policy, cfg)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    policy(input_ids=torch.tensor([[3, 9, 8]])).logits.square().sum().backward()
    optimizer.step()
    return SavedRun(cfg, folder, policy, optimizer, opponent, Checkpoints(folder, cfg, tokenizer, ALONE))


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """As if the disk were full for what is larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

"""A program for test_memory.py: trains, and prints what this process took at most beside what the report says, in MiB.

tests/peak_memory.py section.key=value ...   (or under torchrun: rank 0's numbers)
"""

import json
import sys

import torch
from kv_memory import STATUS, resident

from gspo.cli import leave
from gspo.config import load_config
from gspo.distributed import session
from gspo.memory import footprint
from gspo.model import load_tokenizer
from train import train


def warm_up() -> None:
    """What the first matrix products, graphs and worker threads take is nobody's activation."""
    x = torch.randn(64, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.nn.functional.linear(x, x).float().sum().backward()
    torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 8, 8)).sum()
    torch.optim.AdamW([x]).step()


if __name__ == "__main__":
    cfg = load_config(None, sys.argv[1:])
    load_tokenizer(None)
    warm_up()
    with session() as world:
        before = resident("VmRSS")
        (STATUS.parent / "clear_refs").write_text("5")  # from here on VmHWM counts anew
        train(cfg, world)
        if world.is_main:
            peak = resident("VmHWM") - before
            report = footprint(cfg, world.size, "cpu", cfg.model.precision, 2**62)
            print(json.dumps({"measured": peak, "reported": report.peak / 2**20, "line": report.line()}))
    leave()

"""Samples within argv[1] MiB; prints by how many MiB this process grew at most, and how many MiB of pages it made."""

import sys
from pathlib import Path

import torch
from architectures import tiny_model
from tiny_sampler import prompts_of, sampler_for

from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.slots import Slots

STATUS = Path("/proc/self/status")


def resident(key: str) -> float:
    return next(int(line.split()[1]) / 1024 for line in STATUS.read_text().splitlines() if line.startswith(key))


def watch_peak() -> float:
    """Forget the peak so far (`VmHWM`) -> MiB resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = tiny_model("llama", head_dim=1024, num_key_value_heads=4, num_hidden_layers=2)
    sampler = sampler_for(model, max_slots="auto", kv_memory_gib=float(sys.argv[1]) / 1024, page=16)
    sampler.generate(prompts_of((5,)), 1, Sampling(1.0, max_new_tokens=2))
    made, begin = [], Slots.__init__
    Slots.__init__ = lambda slots, *a: begin(slots, *a) or made.append(slots.prompts.bytes + slots.responses.bytes)
    before = watch_peak()
    sampler.end_ids = set()
    sampler.generate(prompts_of((5, 8, 3, 17)), 24, Sampling(1.0, max_new_tokens=33))
    print(resident("VmHWM") - before, max(made) / 2**20)

"""Measure how much of an offloaded reference is on the device: between uses, and at most. Started by test_world.py.

Counts the bytes of gathered parameters whenever a module begins or ends its forward, and on a GPU what is allocated.

[torchrun --nproc_per_node=K] tests/programs/reference_memory.py OUT.json MODEL_FOLDER
"""

import json
import sys
from pathlib import Path

import torch

from gspo.algorithm.self_play_models import SelfPlayModels
from gspo.distributed.sharding import is_sharded, sharding_units
from gspo.distributed.world import process_group
from gspo.read_config import load_config
from gspo.system.program import end_process
from gspo.types import Prompt, Rollout

TOKENS = 32


def gathered(model, seen):
    """Bytes of the whole parameters that a sharded model holds now; `seen` are all that it ever held."""
    for p in model.parameters():
        if not hasattr(p, "device_mesh"):
            seen[id(p)] = p
    return sum(p.untyped_storage().nbytes() for p in seen.values())


def units(model):
    """Bytes of what is gathered together: layers, embedding, head, and what is left."""
    size = lambda m: sum(p.numel() for p in m.parameters()) * 4  # noqa: E731
    sizes = [size(m) for m in sharding_units(model)]
    assert all(is_sharded(m) for m in sharding_units(model))
    return {"largest": max(sizes), "left": size(model) - sum(sizes), "all": size(model)}


def rollout(device):
    tokens = torch.randint(4, 60, (2, 2, TOKENS)).to(device)
    zeros, lengths = torch.zeros_like(tokens, dtype=torch.float32), torch.full((2, 2), TOKENS, device=device)
    prompts = [Prompt(k, (5, 6, 7), "", "", "") for k in range(2)]
    return Rollout(prompts, tokens, lengths, zeros, zeros, lengths > 0, [["", ""]] * 2)


def main() -> None:
    cfg = load_config(None, [f"model.path={sys.argv[2]}", "model.precision=fp32"])
    with process_group() as world:
        models = SelfPlayModels(cfg, world)
        model, seen, counts = models.frozen["opponent"], {}, []
        sizes = units(model)
        for m in model.modules():
            m.register_forward_pre_hook(lambda *_: counts.append(gathered(model, seen)))
            m.register_forward_hook(lambda *_: counts.append(gathered(model, seen)))
        result = {**sizes, "shards_on": {p.device.type for p in model.parameters()}.pop()}
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        models.logprobs_under(model, rollout(world.device))
        result |= {"peak": max(counts), "after": gathered(model, seen)}
        if world.device.type == "cuda":
            result["cuda_peak"] = torch.cuda.max_memory_allocated() - before
            result["cuda_after"] = torch.cuda.memory_allocated() - before
        if world.is_main:
            Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    end_process()

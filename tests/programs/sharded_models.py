"""Open every architecture in shards, and compare it with the whole model. Started by test_sharded_loading.py.

torchrun --nproc_per_node=K tests/programs/sharded_models.py OUT.json FOLDER  (FOLDER/<family> holds a model)
"""

import json
import sys
from pathlib import Path

import torch

from gspo.distributed.move_weights import full_tensor
from gspo.distributed.sharded_loading import allocate_and_load, meta_model
from gspo.distributed.sharding import is_sharded, shard
from gspo.distributed.world import process_group
from gspo.models.loading import load_model
from gspo.models.safetensors_files import Weights
from gspo.packing.logprobs import check_packing
from gspo.packing.probe_head import measure_head
from gspo.system.program import end_process

read_from_files = []


def counting(self, name, slices=(), plain=Weights.read):
    part = plain(self, name, slices)
    read_from_files.append(part.nbytes)
    return part


def compare(folder, world):
    read_from_files.clear()
    model = allocate_and_load(lambda m: shard(m, world, torch.float32, offload=False), meta_model(folder), folder)
    assert is_sharded(model)
    plain = load_model(folder)
    measured = measure_head(model, world.device)
    check_packing(model, measured, world.device)
    ids = torch.arange(4, 40).view(2, 18)
    with torch.no_grad():
        apart = float((model(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max())
    names, buffers = dict(plain.named_parameters()), dict(plain.named_buffers())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return {
        "weights": all(full_tensor(p).equal(names[name]) for name, p in model.named_parameters()),
        "names": [name for name, _ in model.named_parameters()] == list(names),
        "buffers": all(b.equal(buffers[name]) for name, b in model.named_buffers()),
        "tied": (embedding.weight is head.weight) == plain.config.get_text_config().tie_word_embeddings,
        "head": measured == measure_head(plain),
        "logits": apart,
        "held": sum(p.to_local().nbytes for p in model.parameters()),
        "whole": sum(p.nbytes for p in plain.parameters()),
        "read": sum(read_from_files),
    }


def main() -> None:
    Weights.read = counting
    with process_group() as world:
        result = {folder.name: compare(str(folder), world) for folder in sorted(Path(sys.argv[2]).iterdir())}
        result = world.gather(result)
        if world.is_main:
            Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    end_process()

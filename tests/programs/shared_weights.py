"""A program for test_self_play_models.py: prints the MiB of a model, and those by which a process grows for the models
of one that shares its weights with the sampler, and of one that does not."""

import gc
import tempfile

import torch
from kv_memory import resident
from transformers import AutoConfig, AutoModelForCausalLM

from gspo.algorithm.self_play_models import SelfPlayModels
from gspo.distributed.sharding import local_bytes
from gspo.distributed.world import World
from gspo.read_config import load_config

SHAPE = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 8,
         "vocab_size": 97, "pad_token_id": 0}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    world, grown = World(0, 1, torch.device("cpu"), None), []
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE)).save_pretrained(folder)
        for weights in ("copy", "share", "copy"):  # the first pays for what is set up once
            cfg = load_config(None, [f"model.path={folder}", f"rollout.weights={weights}"])
            gc.collect()
            before = resident("VmRSS")
            models = SelfPlayModels(cfg, world)
            for model in {models.policy, models.sampler, *models.frozen.values()}:
                for p in model.parameters():  # opened weights are the file's own pages until they are written to
                    p.data.mul_(1.0)
            gc.collect()
            grown.append(resident("VmRSS") - before)
            size = local_bytes(models.policy) / 2**20
            del models, model, p
    print(size, *grown[1:])

"""Copy weights from FSDP shards to samplers, and measure the memory this takes. Started by test_world.py.

torchrun --nproc_per_node=K tests/programs/transferred_weights.py TP

prints a JSON list, an object a rank: the MiB of the sampler's parameters in its memory, the MiB by which it grew at
most while they flowed in pieces of 1 MiB, and the parameters that are not the policy's afterwards.
"""

import copy
import json
import sys

import torch
from kv_memory import resident, watch_peak
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from gspo.distributed import move_weights as transfer
from gspo.distributed.move_weights import copy_weights, local_slices
from gspo.distributed.sharding import shard
from gspo.distributed.tensor_parallel import shard_sampler
from gspo.distributed.world import process_group
from gspo.models.loading import cast_parameters
from gspo.system.program import end_process

SHAPE = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 1, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 97, "pad_token_id": 0}  # fmt: skip


def here(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


@torch.no_grad()
def main() -> None:
    transfer.PIECE_NUMEL = 2**19  # 1 MiB in bf16
    with process_group() as world:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
        sampler, _ = shard_sampler(cast_parameters(copy.deepcopy(model), torch.bfloat16), world, int(sys.argv[1]))
        for p in model.parameters():
            p.normal_()
        expected = {name: p.bfloat16() for name, p in model.named_parameters()}
        policy = shard(model, world, torch.bfloat16, offload=False)
        copy_weights(policy, sampler)  # what gloo sets up once is no part of a parameter
        before = watch_peak()
        copy_weights(policy, sampler)
        grown = resident("VmHWM") - before
        wrong = [name for name, p in sampler.named_parameters() if not here(p).equal(expected[name][local_slices(p)])]
        size = sum(here(p).untyped_storage().nbytes() for p in sampler.parameters()) / 2**20
        rows = world.gather({"held": size, "grown": grown, "wrong": wrong})
        if world.is_main:
            print(json.dumps(rows))


if __name__ == "__main__":
    main()
    end_process()

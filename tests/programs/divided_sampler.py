"""Sample with a model divided among ranks, and compare with the whole model. Started by test_tensor_parallel.py.

torchrun --nproc_per_node=2 tests/programs/divided_sampler.py

prints a JSON object: for each model, whether tokens were equal, the largest difference of log-probs, how many
operations on DTensors sampling dispatched, and the share of the layers' bytes that a rank holds.
"""

import copy
import json
from unittest.mock import patch

import torch
from architectures import tiny_model
from tiny_sampler import Tokens, prompts_of
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from gspo.distributed.move_weights import copy_weights
from gspo.distributed.sharding import local_bytes
from gspo.distributed.tensor_parallel import shard_sampler
from gspo.distributed.world import World, process_group
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import Sampler
from gspo.system.program import end_process

MODELS = {"llama": {"attention_bias": True}, "qwen2": {}, "qwen3": {}}  # biases everywhere, of q, k and v, nowhere


def compare(family: str, world: World, **shape: bool) -> dict[str, float]:
    whole = tiny_model(family, **shape)
    whole.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    with torch.no_grad():
        for p in whole.parameters():
            p.normal_(std=0.3)  # biases are 0 in a new model
    divided, agree = shard_sampler(copy.deepcopy(whole), world, 2)
    with torch.no_grad():
        for p in whole.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    copy_weights(whole, divided)  # new weights must be seen by the layers
    sampling, prompts, dispatched = Sampling(1.0, max_new_tokens=12), prompts_of((3, 9, 5)), []
    plain = DTensor.__torch_dispatch__
    one = Sampler(whole, Tokens(), world.device, seed=3).generate(prompts, 3, sampling)
    with patch.object(DTensor, "__torch_dispatch__", lambda *a: dispatched.append(str(a[0])) or plain(*a)):
        two = Sampler(divided, Tokens(), world.device, seed=3, tp=2, agree=agree).generate(prompts, 3, sampling)
    return {
        "same": two.tokens.equal(one.tokens),
        "apart": float((two.logprobs - one.logprobs).abs().max()),
        "dispatched": len(dispatched),
        "share": local_bytes(divided.model.layers) / local_bytes(whole.model.layers),
    }


def main() -> None:
    torch.manual_seed(0)
    with process_group() as world:
        found = {family: compare(family, world, **shape) for family, shape in MODELS.items()}
        if world.is_main:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
    end_process()

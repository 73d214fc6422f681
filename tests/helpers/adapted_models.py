"""The models of a run with model.lora on the embedded base, and the same adapter in peft's own model."""

import peft
import torch
from transformers import AutoModelForCausalLM

from gspo.algorithm.self_play_models import SelfPlayModels
from gspo.distributed.adapters import Adapter
from gspo.distributed.world import World
from gspo.embedded import MODEL_DIR
from gspo.models.lora import adapter_config
from gspo.read_config import load_config

WORLD = World(0, 1, torch.device("cpu"), None)
LORA = "model.lora={rank: 4, alpha: 12}"


def adapted(*overrides, dtype=torch.float32):
    return SelfPlayModels(load_config("configs/quick.yaml", [LORA, *overrides]), WORLD, dtype)


@torch.no_grad()
def move(models, seed=0, size=0.1):
    """Give the policy's adapter other values, as training would."""
    g = torch.Generator().manual_seed(seed)
    for p in models.trained.parameters():
        p.add_(size * torch.randn(p.shape, generator=g))


def in_peft(models, adapter="policy"):
    """peft's own model with the same base and the same adapter, made from its files' names and its configuration."""
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    config = peft.LoraConfig(**adapter_config(base, models.lora, str(MODEL_DIR)) | {"inference_mode": False})
    model = peft.get_peft_model(base, config).eval()
    found = {name: p.detach().clone() for name, p in Adapter(models.policy, adapter).named_parameters()}
    result = peft.set_peft_model_state_dict(model, found)
    assert found and not result.unexpected_keys and not [key for key in result.missing_keys if "lora" in key]
    return model

"""Count, on the device that is not there, what a GPU would launch, read and write; print it as JSON.

Launches a layer in a decoding step, and bytes a token and layer in a training step, forward and backward, under
autocast: those of matrix products, of attention, and of everything else ("elementwise"). Models of two depths are
compared, and packs of two sizes, so that only what each further layer and token costs is counted. docs/gpu.md has the
figures.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import install

import gspo  # noqa: F401 -- before torch

install.install()

import torch  # noqa: E402
from device import launches, traffic  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from gspo.models.kernel_layers import install_layer_kernels  # noqa: E402
from gspo.packing.logprobs import response_logprobs  # noqa: E402
from gspo.packing.pack import pack  # noqa: E402
from gspo.packing.probe_head import Head  # noqa: E402
from gspo.rollout.attention_inputs import pack_prompts  # noqa: E402
from gspo.rollout.cuda_graph_tables import FixedStep, Tables  # noqa: E402
from gspo.rollout.kv_pages import Plan  # noqa: E402
from gspo.rollout.shared_products import join_weights, shared_products  # noqa: E402
from gspo.rollout.slot_attention import forward  # noqa: E402
from gspo.rollout.slots import Slots  # noqa: E402
from gspo.types import Prompt  # noqa: E402

SHAPES = {  # of the models' layers: Qwen2.5-0.5B, Qwen3-0.6B
    "qwen2": {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
    "qwen3": {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
              "head_dim": 128},
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm"}
ATTENTION = {"_flash_attention_forward", "_flash_attention_backward"}


def model_of(family: str, layers: int) -> nn.Module:
    config = AutoConfig.for_model(family, **SHAPES[family], num_hidden_layers=layers, vocab_size=512)
    return install_layer_kernels(AutoModelForCausalLM.from_config(config).eval())


@torch.no_grad()
def decode_launches(family: str, layers: int) -> Counter[str]:
    """Count the launches of one decoding step of 8 slots, as graphs capture it."""
    model = model_of(family, layers).bfloat16().to("cuda")
    device = torch.device("cuda")
    join_weights(model, device)
    with shared_products(model):
        forward(model, probe := pack_prompts([(0,)], device))
        slots = Slots(probe.layout, Plan(8, 8, 8), device)
        forward(model, slots.prefill([0], [(1, 2, 3)]))
        slots.seat([0] * 8, [0] * 8)
        tables = Tables(slots, 8, 8, 3, 60)
        tables.load(8, slots.length + 1, spare_row=8)
        tokens = torch.zeros(8, dtype=torch.long, device=device)
        step = FixedStep(tables, 8)
        launches.clear()
        forward(model, step, tokens)
    return Counter(launches)


def training_bytes(model: nn.Module, response_tokens: int) -> Counter[str]:
    """Count the bytes that a forward and a backward over four responses move, by operation."""
    tokens = (10 + torch.arange(4 * response_tokens) % 490).view(4, -1).to("cuda")  # no two begin alike
    lengths = torch.full((4,), response_tokens)
    packed = pack([Prompt(0, tuple(range(1, 65)), "", "", "")], [0] * 4, tokens, lengths)
    for _ in range(2):  # the second time all is set up
        traffic.clear()
        with torch.autocast("cuda", torch.bfloat16):
            logprobs = response_logprobs(model, Head(1.0, None), packed, 1.0)
        logprobs.sum().backward()
    return Counter(traffic)


def kind(operation: str) -> str:
    return "products" if operation in PRODUCTS else "attention" if operation in ATTENTION else "elementwise"


def training_traffic(family: str) -> dict[str, dict[str, int]]:
    """Return bytes a token and layer, by kind and operation."""
    short, long = 48, 112
    found: Counter[str] = Counter()
    for layers, sign in ((1, -1), (2, 1)):
        model = model_of(family, layers).to("cuda")
        for response_tokens, other in ((short, -1), (long, 1)):
            for name, size in training_bytes(model, response_tokens).items():
                found[name] += sign * other * size
    table: dict[str, dict[str, int]] = {}
    for name, size in found.most_common():
        if size:
            table.setdefault(kind(name), {})[name] = round(size / (4 * (long - short)))
    return table


def main() -> None:
    counted = {}
    for family in sys.argv[1:] or SHAPES:
        one, two = (decode_launches(family, layers) for layers in (1, 2))
        counted[family] = {"launches": {k: v - one[k] for k, v in two.most_common() if v != one[k]}}
        counted[family]["bytes"] = training_traffic(family)
    print(json.dumps(counted))


if __name__ == "__main__":
    main()

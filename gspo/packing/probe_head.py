"""Probe how a model turns hidden @ weight.T into logits (scale, soft cap), so that log-probs need no logits.

Some classes scale or cap their logits, under names that mislead (Granite divides by `logits_scaling`, HyperCLOVA X
multiplies by it) or that no list knows. `linear_logprob` takes scale and cap; where a head is of another kind,
log-probs are computed from the model's logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gspo.distributed.sharding import run_as_forward
from gspo.models.attention_support import plain_attention

SMALL, LARGE = 2.0**-10, 2.0**20  # inputs too small for a cap to change, and so large that any cap is reached


class Head(NamedTuple):
    """Logits as a function of the products y = hidden @ weight.T + bias [..., V].

    softcap * tanh(scale * y / softcap), or scale * y without a cap. hidden are the base model's last hidden states,
    weight and bias the output layer's.
    """

    scale: float
    softcap: float | None

    def __call__(self, y: Tensor) -> Tensor:
        z = self.scale * y
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


@torch.no_grad()
def measure_head(model: nn.Module, device: torch.device | None = None) -> Head | None:
    """Return a model's head; None where its logits are made in another way.

    The model runs on `device` (None: where its weights are). On a sharded model all ranks must call this together.

    In one forward the output layer returns numbers of ours instead of its products: its input must be the base
    model's last hidden states, and what the class makes of the numbers gives scale and cap. The numbers go far beyond
    a model's own logits, to show caps that training would only reach later.
    """
    layer, base = model.get_output_embeddings(), model.base_model
    if type(layer).forward is not nn.Linear.forward or base is model:  # sharding makes a subclass of it
        return None
    if {*model.parameters()} - {
        *base.parameters(),
        *layer.parameters(),
    }:  # parameters elsewhere may be zero now, and be trained
        return None
    ids = torch.tensor([[4, 1, 3, 2]], device=layer.weight.device if device is None else device)
    y = torch.linspace(-90.0, 90.0, layer.out_features, device=ids.device).repeat(1, 4, 1)
    y[0, :3] = torch.tensor([[0.0], [SMALL], [LARGE]])
    seen = []  # inputs of the output layer

    def return_ours(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> Tensor:
        seen.append(inputs[0])
        return y.clone()

    handle = layer.register_forward_hook(return_ours)
    with plain_attention(model.config):
        try:
            logits = model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        hidden = run_as_forward(model, _last_hidden, ids)
    if len(seen) != 1 or not _same(seen[0], hidden) or logits.shape != y.shape:
        return None
    scale, top = logits[0, 1, 0].item() / SMALL, logits[0, 2, 0].item()
    head = Head(scale, top if top < 0.5 * scale * LARGE else None)
    return head if _same(logits, head(y)) else None


def _last_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=0.0)

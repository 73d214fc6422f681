"""What a model's class makes of its hidden states and one weight matrix: measured, so that logits can be done without.

Most logits are `hidden @ weight.T`. Some classes scale or cap them, by names that mislead (Granite divides by
`logits_scaling`, HyperCLOVA X multiplies by it) or that no list knows. `linear_logprob` has to be told; where a
head is something else, log-probs come from its logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gspo.distributed.sharding import run_as_forward

SMALL, LARGE = 2.0**-10, 2.0**20  # products that no cap bends, and that any cap stops


class Head(NamedTuple):
    """Logits are softcap * tanh(scale * y / softcap), or scale * y if there is no cap, of products y [..., V].

    y = hidden @ weight.T + bias with the base model's last hidden states and its output layer's weight and bias.
    """

    scale: float
    softcap: float | None

    def __call__(self, y: Tensor) -> Tensor:
        z = self.scale * y
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


@torch.no_grad()
def measure_head(model: nn.Module, device: torch.device | None = None) -> Head | None:
    """The head of a model that runs on `device` (None: where its weights are); None where logits come about in another
    way. On a sharded model all ranks must call this together.

    One forward in which the output layer answers with numbers of ours: what it was given must be the base model's
    last hidden states, and what becomes of the numbers is the class's scale and cap. They reach far beyond a model's
    own logits, where caps that training will meet do not show yet.
    """
    layer, base = model.get_output_embeddings(), model.base_model
    if type(layer).forward is not nn.Linear.forward or base is model:  # sharding makes a subclass of it
        return None
    if {*model.parameters()} - {*base.parameters(), *layer.parameters()}:  # may be zero now, and be trained
        return None
    ids = torch.tensor([[4, 1, 3, 2]], device=layer.weight.device if device is None else device)
    y = torch.linspace(-90.0, 90.0, layer.out_features, device=ids.device).repeat(1, 4, 1)
    y[0, :3] = torch.tensor([[0.0], [SMALL], [LARGE]])
    given = []

    def answer(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> Tensor:
        given.append(inputs[0])
        return y.clone()

    handle = layer.register_forward_hook(answer)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    hidden = run_as_forward(model, _last_hidden, ids)
    if len(given) != 1 or not _same(given[0], hidden) or logits.shape != y.shape:
        return None
    scale, top = logits[0, 1, 0].item() / SMALL, logits[0, 2, 0].item()
    head = Head(scale, top if top < 0.5 * scale * LARGE else None)
    return head if _same(logits, head(y)) else None


def _last_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=0.0)

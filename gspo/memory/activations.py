"""What a forward and backward take beside weights and gradients, found without doing them.

The step itself runs on tensors without storage (torch's FakeTensorMode), while every storage that comes and goes is
counted. So the answer knows the model's class, packs, checkpointing and autocast as the run will; no formula does.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from gspo.models.compiled_layers import install_compiled_layers
from gspo.models.loading import checkpoint_activations
from gspo.packing.head import Head
from gspo.packing.logprobs import response_logprobs, surrogate
from gspo.packing.pack import PackedBatch
from gspo.rollout.attention import forward
from gspo.rollout.pages import Layer
from gspo.rollout.steps import side_by_side

Autocast = Callable[[], AbstractContextManager]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside that are still alive: `now`, and `peak`. `held`: tensors that were there
    before, of which views may be made."""

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held = [x.untyped_storage() for x in held]
        self._sizes: dict[int, int] = {id(storage): 0 for storage in self._held}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = _run(function, args, kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # one Python object for each storage, as long as it lives
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _run(function: Any, args: tuple, kwargs: dict) -> Any:
    """The experts' product takes float32 on CPUs, but without storage, as of torch 2.13, bfloat16 only."""
    if function is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32:
        return function(*(x.bfloat16() for x in args[:2]), *args[2:], **kwargs).float()
    return function(*args, **kwargs)


class FakeModel:
    """A model of some configuration whose tensors have no storage, and what becomes of memory when it runs."""

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, checkpointing: bool = False):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        install_compiled_layers(self.model).config.use_cache = False
        if checkpointing:
            checkpoint_activations(self.model)
        layer, cap = self.model.get_output_embeddings(), getattr(config, "final_logit_softcapping", None)
        plain = type(layer).forward is nn.Linear.forward and self.model.base_model is not self.model
        self.head = Head(1.0, cap) if plain else None

    def layout(self) -> dict[int, Layer]:
        """Layer -> what it keeps of a token while sampling."""
        with torch.no_grad(), self.mode, LiveBytes():
            forward(self.model, probe := side_by_side([(0,)], torch.device("cpu")))
        return probe.layout

    def training(self, pack: PackedBatch, autocast: Autocast, exact: bool, further: bool) -> int:
        """Bytes of a forward and backward over `pack` beside weights and gradients, at most; `exact`: with the loss in
        the graph, otherwise with frozen coefficients. `further`: gradients of an earlier micro-batch are there, and
        what is new is added to them."""
        parameters = list(self.model.parameters())
        with self.mode:
            for p in parameters:
                p.grad = torch.empty_like(p) if further else None
            with LiveBytes(parameters) as live:
                with autocast():
                    if exact:
                        loss = response_logprobs(self.model, self.head, pack, 1.0).double().sum()
                    else:
                        loss = surrogate(
                            self.model, self.head, pack, 1.0, lambda logprob, tokens: torch.ones_like(logprob)
                        )
                loss.backward(torch.tensor(1.0, dtype=loss.dtype))
        return live.peak if further else max(0, live.peak - sum(p.nbytes for p in parameters))

    def scoring(self, pack: PackedBatch, autocast: Autocast) -> int:
        """Bytes of a forward without gradients, at most."""
        with torch.no_grad(), self.mode, LiveBytes(self.model.parameters()) as live, autocast():
            response_logprobs(self.model, self.head, pack, 1.0)
        return live.peak

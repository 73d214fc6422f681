"""Count the bytes of activations that a forward and a backward need, without computing them.

The real training code runs on fake tensors, which have shapes but no storage (torch's FakeTensorMode), while a dispatch
mode counts the bytes of every storage that is created and freed. So model class, packing, gradient checkpointing and
autocast are counted as the run will have them. There is no formula that could leave one out.
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
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from gspo.models.kernel_layers import install_layer_kernels
from gspo.models.loading import build_model, checkpoint_activations
from gspo.models.lora import POLICY, Lora, adapted_layers, add_adapters
from gspo.packing.logprobs import response_logprobs, surrogate
from gspo.packing.pack import PackedBatch
from gspo.packing.probe_head import Head
from gspo.rollout.attention_inputs import pack_prompts
from gspo.rollout.kv_pages import Layer
from gspo.rollout.slot_attention import forward

Autocast = Callable[[], AbstractContextManager]


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the storages created in a `with` block: `now` those that are alive, `peak` the most so far.

    Tensors of `existing` were created before: views of them count as 0 bytes.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0  # bytes
        self._existing = [x.untyped_storage() for x in existing]  # kept alive, so that no new storage gets their id
        self._sizes: dict[int, int] = {id(storage): 0 for storage in self._existing}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = _call(function, args, kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Add a new storage's bytes until it is freed."""
        key = id(storage)  # each storage has one Python object as long as it lives
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _call(function: Any, args: tuple, kwargs: dict) -> Any:
    """Call an operator. Experts' grouped product runs in bfloat16: on fake tensors torch 2.13 refuses float32."""
    if function is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32:
        return function(*(x.bfloat16() for x in args[:2]), *args[2:], **kwargs).float()
    return function(*args, **kwargs)


class FakeModel:
    """A model of fake tensors, and the memory that it would need to train, to score and to sample.

    With `lora` it has an adapter, which alone is trained; `products` is the dtype that its frozen linear layers have.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        checkpointing: bool = False,
        lora: Lora | None = None,
        products: torch.dtype = torch.float32,
    ):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode, no_init_weights():  # fake tensors have no values to draw
            self.model = build_model(config, config.name_or_path, dtype=dtype).eval()
        self.model.tie_weights()  # which is part of what was left out
        install_layer_kernels(self.model).config.use_cache = False
        if checkpointing:
            checkpoint_activations(self.model)
        if lora is not None:
            self._add_adapter(lora, dtype, products)
        layer, cap = (
            self.model.get_output_embeddings(),
            getattr(config.get_text_config(), "final_logit_softcapping", None),
        )
        plain = type(layer).forward is nn.Linear.forward and self.model.base_model is not self.model
        self.head = Head(1.0, cap) if plain else None

    def _add_adapter(self, lora: Lora, dtype: torch.dtype, products: torch.dtype) -> None:
        """Inject the policy's adapter, in the dtype that it is gathered in; its base's linear layers get `products`."""
        add_adapters(self.model, lora, [POLICY])
        for layer in adapted_layers(self.model).values():
            with self.mode:  # fake tensors are replaced, as they cannot be cast in place
                if dtype == torch.float32:
                    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to(products), requires_grad=False)
                    if layer.base_layer.bias is not None:
                        layer.base_layer.bias = nn.Parameter(layer.base_layer.bias.to(products), requires_grad=False)
                for part in (layer.lora_A[POLICY], layer.lora_B[POLICY]):
                    part.weight = nn.Parameter(torch.empty(part.weight.shape, dtype=dtype))

    def kv_layout(self) -> dict[int, Layer]:
        """Return for each layer the shape of the keys and values that it caches for a token."""
        with torch.no_grad(), self.mode, LiveBytes():
            forward(self.model, probe := pack_prompts([(0,)], torch.device("cpu")))
        return probe.layout

    def prefill_bytes(self, sizes: list[int]) -> int:
        """Return the peak bytes of a forward over prompts of these sizes before sampling; nothing is kept of them."""
        prompts = [(0,) * size for size in sizes]
        with torch.no_grad(), self.mode, LiveBytes(self.model.parameters()) as live:
            forward(self.model, pack_prompts(prompts, torch.device("cpu")))
        return live.peak

    def training_bytes(self, pack: PackedBatch, autocast: Autocast, exact: bool, accumulating: bool) -> int:
        """Return the peak bytes of a forward and backward over `pack`, weights and gradients not counted.

        exact: the loss is part of the graph; otherwise the surrogate with fixed coefficients is (algorithm/update.py).
        accumulating: an earlier micro-batch has left gradients, to which new ones of the same size are added.
        """
        parameters = list(self.model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        with self.mode:
            for p in trained:
                p.grad = torch.empty_like(p) if accumulating else None
            with LiveBytes(parameters) as live:
                with autocast():
                    if exact:
                        loss = response_logprobs(self.model, self.head, pack, 1.0).double().sum()
                    else:
                        loss = surrogate(
                            self.model, self.head, pack, 1.0, lambda logprob, tokens: torch.ones_like(logprob)
                        )
                loss.backward(torch.tensor(1.0, dtype=loss.dtype))
        gradients = sum(p.nbytes for p in trained)
        return live.peak if accumulating else max(0, live.peak - gradients)

    def scoring_bytes(self, pack: PackedBatch, autocast: Autocast) -> int:
        """Return the peak bytes of a forward over `pack` without gradients, weights not counted."""
        with torch.no_grad(), self.mode, LiveBytes(self.model.parameters()) as live, autocast():
            response_logprobs(self.model, self.head, pack, 1.0)
        return live.peak

"""Train a model's LoRA adapters instead of its weights (`model.lora`): read the setting, and inject adapters by peft.

An adapter adds scaling * B A x to what a linear layer W x gives (arXiv 2106.09685); W stays as it is. A model holds up
to two of them in the same layers, the policy's and the opponent's, and a forward uses one, or none: the base.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gspo.errors import UserError
from gspo.models.loading import text_decoder
from gspo.models.patching import replaced

POLICY, OPPONENT = "policy", "opponent"  # adapters by name
ALL_LINEAR = "all-linear"  # as peft and verl write it
EXAMPLE = "model.lora={rank: 16}, or {rank: 16, alpha: 32, targets: [q_proj, v_proj]}"
NAMES = {  # in the setting, also as peft's LoraConfig has them
    **{"rank": "rank", "alpha": "alpha", "targets": "targets", "dropout": "dropout"},
    **{"r": "rank", "lora_alpha": "alpha", "target_modules": "targets", "lora_dropout": "dropout"},
}
PREFIX = "base_model.model."  # before the names of adapters in peft's files


@dataclass(frozen=True)
class Lora:
    """The setting `model.lora`, checked."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()  # ends of the names of linear layers; none: all of the decoder

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank

    @classmethod
    def of(cls, setting: dict[str, Any]) -> "Lora | None":
        """Read the setting; None where it is empty. UserError where it names something else, or a wrong value."""
        if not setting:
            return None
        given: dict[str, Any] = {}
        for typed, value in setting.items():
            if typed not in NAMES:
                _refuse(f"{typed!r} is no part of it: there are rank, alpha, targets and dropout")
            if NAMES[typed] in given:
                _refuse(f"{typed} is given twice, by two names")
            given[NAMES[typed]] = value
        rank, dropout = given.get("rank"), given.get("dropout")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            _refuse(f"rank = {rank!r} is no whole number from 1 on")
        alpha = given.get("alpha")
        alpha = 2 * rank if alpha is None else alpha
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            _refuse(f"alpha = {alpha!r} is no number above 0")
        if dropout not in (None, 0) or isinstance(dropout, bool):
            _refuse(
                f"dropout = {dropout!r} is refused: a policy that is trained with dropout is not the one that samples; "
                "leave it out"
            )
        return cls(rank, alpha, _targets(given.get("targets")))


def _targets(value: Any) -> tuple[str, ...]:
    """Return the names of the layers to adapt; none where all are meant."""
    names = [value] if isinstance(value, str) else value
    if value is None or names == [ALL_LINEAR]:
        return ()
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) and name for name in names):
        _refuse(f"targets = {value!r} is no list of names of layers, such as [q_proj, v_proj]")
    return tuple(names)


def _refuse(what: str) -> None:
    raise UserError(f"model.lora: {what}. For example: {EXAMPLE}.")


def find_targets(model: nn.Module, lora: Lora) -> list[str]:
    """Return the names of the linear layers that get an adapter: of the text decoder, never the head.

    UserError where there is none, or nothing has one of the names.
    """
    decoder, head = text_decoder(model), model.get_output_embeddings()
    inside = {id(m) for m in decoder.modules()} - {id(head)}
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside]
    kind = model.config.model_type
    if not linear:
        raise UserError(f"model.lora: {kind} has no linear layers that peft can adapt. Leave model.lora empty.")
    for target in lora.targets:
        if not any(_is_called(name, target) for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f"model.lora: targets has {target!r}, and no linear layer of {kind}'s decoder is called so; it has "
                f"{', '.join(known)}. Name some of these, or leave targets out for all of them (the head gets none)."
            )
    return [name for name in linear if not lora.targets or any(_is_called(name, target) for target in lora.targets)]


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def require_peft() -> Any:
    """Return the package peft. UserError where it is not installed, or does not work with these versions."""
    try:
        import peft
    except Exception as e:  # beside ImportError, what it raises beside another transformers
        raise UserError(
            f"model.lora needs the package peft, which cannot be imported ({' '.join(str(e).split()):.120}). Run `pip "
            "install peft`, or leave model.lora empty to train all weights."
        ) from e
    return peft


def adapter_config(model: nn.Module, lora: Lora, base: str) -> dict[str, Any]:
    """Return the content of adapter_config.json: what peft needs to know beside the adapter and its `base`."""
    config = _peft_config(model, lora, inference_mode=True)
    config.base_model_name_or_path = base
    found = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return {name: getattr(value, "value", value) for name, value in sorted(found.items())}


def _peft_config(model: nn.Module, lora: Lora, **options: Any) -> Any:
    """Return peft's LoraConfig. Layers are named by their last part where that names no others, such as the head."""
    targets = find_targets(model, lora)
    short = sorted({name.rpartition(".")[2] for name in targets})
    called = {name for name, _ in model.named_modules() if any(_is_called(name, end) for end in short)}
    modules = short if called == set(targets) else targets
    return require_peft().LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=modules, lora_dropout=0.0, task_type="CAUSAL_LM", **options
    )


def add_adapters(model: nn.Module, lora: Lora, names: list[str]) -> nn.Module:
    """Freeze a model, and inject adapters of these names, without values: their weights are on the meta device.

    The first is the one that forwards use, and the only one that is trained. All are float32, whatever the base is.
    """
    inject, config = require_peft().inject_adapter_in_model, _peft_config(model, lora)
    for name in names:
        with warnings.catch_warnings():  # peft warns of a second adapter
            warnings.simplefilter("ignore")
            inject(config, model, adapter_name=name, low_cpu_mem_usage=True)
    model.requires_grad_(False)
    for layer in adapted_layers(model).values():
        layer.cast_input_dtype_enabled = False  # autocast and FSDP choose the precision of products
        layer._active_adapter = [names[0]]
        for name in names:
            for part in (layer.lora_A[name], layer.lora_B[name]):
                part.float().requires_grad_(name == names[0])
    return model


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return peft's layers by the names of the linear layers that they stand for; none in a model without adapters."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}


def plain_name(name: str) -> str:
    """Return the name that a parameter of the base has in the model without adapters."""
    return name.replace(".base_layer.", ".")


def stored_names(layer: str) -> tuple[str, str]:
    """Return the names of a layer's A and B in peft's files."""
    return f"{PREFIX}{layer}.lora_A.weight", f"{PREFIX}{layer}.lora_B.weight"


def adapter_parameters(model: nn.Module, adapter: str | None) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of one adapter by their names in peft's files; none of None, the base."""
    if adapter is not None:
        for name, layer in adapted_layers(model).items():
            for stored, part in zip(stored_names(name), (layer.lora_A, layer.lora_B), strict=True):
                yield stored, part[adapter].weight


def using_adapter(model: nn.Module, adapter: str | None) -> AbstractContextManager:
    """Use another adapter in the forwards inside; None: the base alone.

    peft's own switch would also change what is trained.
    """
    change = ("_disable_adapters", True) if adapter is None else ("_active_adapter", [adapter])
    return replaced([(layer, *change) for layer in adapted_layers(model).values()])


def merged(base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return base + scaling * b @ a in float32; base [O, I] in any precision, a [R, I], b [O, R]."""
    return torch.addmm(base.float(), b.float(), a.float(), alpha=scaling)

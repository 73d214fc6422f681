"""Write and open checkpoints of runs with model.lora: peft's folder of an adapter, and the base that it names.

Opening one needs no peft: the adapter is merged into the base's weights.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gspo.checkpoint import fingerprints
from gspo.checkpoint.hf_folder import json_bytes
from gspo.config import Config
from gspo.distributed.adapters import FILE
from gspo.errors import UserError
from gspo.models.loading import load_model, model_without_weights
from gspo.models.lora import PREFIX, Lora, adapter_config, merged, stored_names
from gspo.models.model_folder import read_json, resolve_path
from gspo.models.safetensors_files import Weights, open_weights, stored_folder
from gspo.models.stored_weights import match_names, refuse_non_finite
from gspo.system.files import remove

CONFIG = "adapter_config.json"
PLAIN = {  # what an adapter that is merged here may have, beside sizes and names
    **{"peft_type": "LORA", "bias": "none", "modules_to_save": None, "use_dora": False, "fan_in_fan_out": False},
    **{"lora_bias": False, "rank_pattern": {}, "alpha_pattern": {}, "layer_replication": None},
    **{"target_parameters": None, "trainable_token_indices": None, "use_rslora": False},
}


class AdapterFolder:
    """What a checkpoint's folder holds of a policy with an adapter, as ModelFolder says it of a whole one."""

    stem, in_one_file = FILE, True  # peft opens no adapter in several files

    def __init__(self, source: str, tokenizer: Any, lora: Lora):
        self.base = str(Path(source).resolve()) if Path(source).exists() else source
        self.tokenizer, self.lora = tokenizer, lora
        self._config = json_bytes(adapter_config(model_without_weights(source), lora, self.base))

    def stored_tensors(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return a parameter as the file stores it: its name is peft's already."""
        return {name: tensor}

    def other_files(self, scratch: Path, dtype: torch.dtype) -> dict[str, bytes]:
        """Return {name: content} of adapter_config.json and tokenizer files, which go through the folder `scratch`."""
        remove(scratch)
        self.tokenizer.save_pretrained(scratch)
        files = {str(x.relative_to(scratch)): x.read_bytes() for x in scratch.rglob("*") if x.is_file()}
        remove(scratch)
        return files | {CONFIG: self._config}


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's folder that has been opened."""

    folder: str
    base: str  # folder or hub name of the model that it belongs to
    scaling: float

    @cached_property
    def weights(self) -> Weights:
        return open_weights(Path(self.folder), FILE)

    @cached_property
    def layers(self) -> list[str]:
        """The names of the linear layers that it adapts. UserError where it has anything else, or values that are not
        finite."""
        ends = [name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in self.weights.names]
        found = [layer for layer in ends if not layer.endswith(".weight")]
        if other := {name for layer in found for name in stored_names(layer)} ^ set(self.weights.names):
            raise _cannot_merge(self.folder, f"{FILE}.safetensors and {min(other)}")
        refuse_non_finite(
            self.folder, ((name, self.weights.read(name)) for name in self.weights.names), may_be_zero=True
        )
        return found

    def merge(self, layer: str, weight: Tensor) -> Tensor:
        """Return a layer's weight of the base with the adapter, in float32. UserError where their shapes differ."""
        a, b = (self.weights.read(name) for name in stored_names(layer))
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise UserError(
                f"{self.folder} holds for {layer} an adapter of {list(a.shape)} and {list(b.shape)}, which does not "
                f"fit the weight {list(weight.shape)} of {self.base!r}. It is of another base: put that back."
            )
        return merged(weight, a.to(weight.device), b.to(weight.device), self.scaling)


def open_adapter(name: str | None) -> StoredAdapter | None:
    """Open the folder of an adapter; None for any other model.

    UserError where its base is not there or has changed since its run began, or it is more than plain LoRA.
    """
    folder = Path(name or "")
    if name is None or not (folder / CONFIG).exists() or (folder / "config.json").exists():
        return None
    config = read_json(name, CONFIG)
    if odd := [key for key, value in PLAIN.items() if key in config and (config[key] or None) != (value or None)]:
        raise _cannot_merge(name, f"{CONFIG} and {odd[0]} = {config[odd[0]]!r}")
    base, rank, alpha = (config.get(key) for key in ("base_model_name_or_path", "r", "lora_alpha"))
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) and x > 0 for x in (rank, alpha))
    if not isinstance(base, str) or not base or not numbers:
        raise UserError(f"{folder / CONFIG} does not name its base, rank and alpha. Fetch or copy the file again.")
    _check_base(folder, base)
    return StoredAdapter(name, base, alpha / rank)


def _cannot_merge(folder: str, what: str) -> UserError:
    return UserError(
        f"{folder} is an adapter of a kind that is not merged here ({what}). Merge it by peft: "
        "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(OUT)."
    )


def _check_base(folder: Path, base: str) -> None:
    """Raise UserError where the base is gone, or is not what the adapter's run began with."""
    if Path(base).is_absolute() and not Path(base).exists():
        raise UserError(
            f"{folder} is an adapter of {base!r} ({CONFIG}), and there is nothing at that place any more. Put the base "
            f"back there, or a link to it: ln -s BASE {base}."
        )
    kept, found = _fingerprint_kept(folder), fingerprints.of_model(base)
    if kept and found and kept != found:
        raise UserError(
            f"{folder} is an adapter of {base!r} ({CONFIG}), which does not hold the model any more that its run began "
            "with: merged into another, it would be another policy. Put that model back there."
        )


def _fingerprint_kept(folder: Path) -> str:
    """Return the fingerprint of the base that the run of a checkpoint kept, or ""."""
    return fingerprints.read(folder.resolve().parent.parent).get("model.path", "")


def base_of(name: str | None) -> str | None:
    """Return where a model's config.json and weights are: an adapter's base; of any other model its own name."""
    adapter = open_adapter(name)
    return name if adapter is None else adapter.base


@torch.no_grad()
def load_policy(name: str | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a model as `load_model` does, or the base of an adapter's folder with the adapter merged. UserError."""
    adapter = open_adapter(name)
    model = load_model(name if adapter is None else adapter.base, dtype)
    for layer in adapter.layers if adapter else []:
        try:
            weight = model.get_parameter(f"{layer}.weight")
        except AttributeError as e:
            raise _no_layer(adapter, layer) from e
        weight.copy_(adapter.merge(layer, weight))
    return model


def _no_layer(adapter: StoredAdapter, layer: str) -> UserError:
    return UserError(f"{adapter.folder} adapts {layer}, which {adapter.base!r} has not. It is of another base.")


class MergedWeights:
    """The stored tensors of an adapter's base, in float32, merged one by one as they are read."""

    def __init__(self, adapter: StoredAdapter):
        self.adapter, self._base = adapter, open_weights(stored_folder(adapter.base))
        found, _ = match_names(model_without_weights(adapter.base), self._base.names)
        self._layer_of: dict[str, str] = {}
        for layer in adapter.layers:
            converter, stored = found.get(f"{layer}.weight", (None, {}))
            if converter is not None or len(stored) != 1:
                raise _no_layer(adapter, layer)
            self._layer_of[next(iter(stored))] = layer

    @property
    def names(self) -> list[str]:
        return self._base.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        kept = self._base.dtype(name)
        return torch.float32 if kept.is_floating_point else kept

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU."""
        x = self._base.read(name)
        layer = self._layer_of.get(name)
        return x.to(self.dtype(name)) if layer is None else self.adapter.merge(layer, x)


def check_kind(checkpoint: Path, cfg: Config) -> bool:
    """Return whether a checkpoint to resume from is an adapter. UserError unless it is as model.lora and model.path
    have it."""
    lora, stored = Lora.of(cfg.model.lora), read_json(str(checkpoint), CONFIG)
    if lora is None and stored is None:
        return False
    if lora is None:
        setting = json.dumps({"rank": stored.get("r"), "alpha": stored.get("lora_alpha")}).replace('"', "")
        raise UserError(
            f"{checkpoint} is a checkpoint of an adapter, and model.lora is empty. Go on with it as its run had it "
            f"(model.lora={setting}), or export it and train all weights of that: python -m gspo.export {checkpoint} "
            "FOLDER, model.path=FOLDER."
        )
    if stored is None:
        raise UserError(
            f"{checkpoint} is a checkpoint of a run that trained all weights, and model.lora is set. Leave it empty, "
            f"or train an adapter of that model in a run of its own: model.path={checkpoint}."
        )
    found = stored.get("r"), stored.get("lora_alpha")
    if found != (lora.rank, lora.alpha):
        raise UserError(
            f"{checkpoint} holds an adapter of rank {found[0]} and alpha {found[1]}, and model.lora has rank "
            f"{lora.rank} and alpha {lora.alpha}. Give those of the checkpoint."
        )
    kept, now = _fingerprint_kept(checkpoint), fingerprints.of_model(resolve_path(cfg.model.path))
    if kept and now and kept != now:
        raise UserError(
            f"{checkpoint} holds an adapter of {stored.get('base_model_name_or_path')!r}, and model.path = "
            f"{resolve_path(cfg.model.path)!r} holds another model. Give the model.path that its run began with."
        )
    return True

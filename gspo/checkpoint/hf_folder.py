"""Hugging Face folders: what stands beside the weights, and what the weights are called in them."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from gspo.system.files import remove


class ModelFolder:
    """A model's class without its weights: enough to write it as a folder that `from_pretrained` opens.

    `source` is the folder or name the model came from, whose config and generation config are kept.
    """

    def __init__(self, source: str, tokenizer: Any):
        with torch.device("meta"):
            self.meta_model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
        with contextlib.suppress(OSError):  # not every model has one
            self.meta_model.generation_config = GenerationConfig.from_pretrained(source)
        self.tokenizer = tokenizer
        self._converts = bool(get_model_conversion_mapping(self.meta_model, add_legacy=False))
        self._beside: dict[str, bytes] = {}

    def pieces(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A parameter, by its name in the model -> what files have of it: other names, or one tensor an expert."""
        if not self._converts:
            return {name: tensor}
        found = revert_weight_conversion(self.meta_model, {name: tensor})
        return {key: value.contiguous() for key, value in found.items()}

    def beside(self, scratch: Path, dtype: torch.dtype) -> dict[str, bytes]:
        """{name: content} of config, generation config and tokenizer, by way of a folder `scratch` that is removed."""
        if not self._beside:
            remove(scratch)
            self.meta_model.generation_config.save_pretrained(scratch)
            self.meta_model.config.save_pretrained(scratch)
            self.tokenizer.save_pretrained(scratch)
            files = [file for file in scratch.rglob("*") if file.is_file()]
            beside = {str(file.relative_to(scratch)): file.read_bytes() for file in files}
            config = json.loads(beside["config.json"])
            config |= {"architectures": [type(self.meta_model).__name__], "dtype": str(dtype)[6:]}
            beside["config.json"] = json_bytes(config)
            remove(scratch)
            self._beside = beside
        return self._beside


def shard_files(stem: str, shards: int) -> list[str]:
    """The names of a set of files: `model.safetensors`, or `model-00001-of-00004.safetensors` and so on."""
    if shards == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{k + 1:05d}-of-{shards:05d}.safetensors" for k in range(shards)]


def index_json(total_bytes: int, places: dict[str, str]) -> bytes:
    """`<stem>.safetensors.index.json`: which file has which tensor."""
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
    return json_bytes(content)


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

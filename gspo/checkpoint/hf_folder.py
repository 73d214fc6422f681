"""Write Hugging Face folders: names of weights and weight files, config.json, tokenizer and generation config."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from gspo.models.loading import model_without_weights
from gspo.system.files import remove


class ModelFolder:
    """Everything but the weights that a folder needs for `from_pretrained` to open it.

    `source` is the folder or hub name of the original model, whose config and generation config are kept; of the
    latter, what transformers can save (models/generation.py).
    """

    stem, in_one_file = "model", False  # of the files of weights, one a rank

    def __init__(self, source: str, tokenizer: Any):
        self.meta_model = model_without_weights(source)
        self.tokenizer = tokenizer
        self._converts = bool(get_model_conversion_mapping(self.meta_model, add_legacy=False))
        self._other_files: dict[str, bytes] = {}

    def stored_tensors(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return a parameter as files store it: under another name, or as one tensor for each expert, if need be."""
        if not self._converts:
            return {name: tensor}
        found = revert_weight_conversion(self.meta_model, {name: tensor})
        return {key: value.contiguous() for key, value in found.items()}

    def other_files(self, scratch: Path, dtype: torch.dtype) -> dict[str, bytes]:
        """Return {name: content} of config, generation config and tokenizer files.

        transformers writes them to the folder `scratch`, which is removed afterwards.
        """
        if not self._other_files:
            remove(scratch)
            self.meta_model.generation_config.save_pretrained(scratch)
            self.meta_model.config.save_pretrained(scratch)
            self.tokenizer.save_pretrained(scratch)
            files = [file for file in scratch.rglob("*") if file.is_file()]
            contents = {str(file.relative_to(scratch)): file.read_bytes() for file in files}
            config = json.loads(contents["config.json"])
            config |= {"architectures": [type(self.meta_model).__name__], "dtype": str(dtype)[6:]}
            contents["config.json"] = json_bytes(config)
            remove(scratch)
            self._other_files = contents
        return self._other_files


def shard_files(stem: str, shards: int) -> list[str]:
    """Return the names of a set of files: `model.safetensors`, or `model-00001-of-00004.safetensors` and so on."""
    if shards == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{k + 1:05d}-of-{shards:05d}.safetensors" for k in range(shards)]


def index_json(total_bytes: int, file_of: dict[str, str]) -> bytes:
    """Return the content of `<stem>.safetensors.index.json`, which says which file has which tensor."""
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}
    return json_bytes(content)


def json_bytes(value: Any) -> bytes:
    """Return indented JSON in UTF-8."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

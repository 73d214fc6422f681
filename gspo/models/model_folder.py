"""Check a model's folder before transformers opens it, and say what transformers would fail at or ask about.

Nothing here reads weights; stored_weights.py compares those with the model.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from gspo.embedded import MODEL_DIR
from gspo.errors import UserError
from gspo.read_paths import mistyped_path, near_names
from gspo.read_yaml import TwiceError, without_repeats
from gspo.system.console import say

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
POINTER = b"version https://git-lfs.github.com/spec/"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
MOST = {  # no model has more
    "num_hidden_layers": 10_000,
    "vocab_size": 2**26,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_attention_heads": 2**14,
    "num_experts": 2**14,
    "num_local_experts": 2**14,
}
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")  # OWNER/NAME
FLOATS = ("float32", "bfloat16", "float16", "float64", "float", "half", "double", "auto")
QUANTISED = ("quantization_config", "compression_config", "quantization")  # keys of config.json


def resolve_path(path: str | None) -> str:
    """Return the folder or hub name to load; the embedded model where none is named."""
    return str(MODEL_DIR) if path is None else str(path)


def cannot_open(path: str, error: Exception | str) -> UserError:
    """Return the error that names `path` and why transformers or the hub could not open it."""
    reason = " ".join(str(error).split())[:300].rstrip(".")
    what = "cannot be opened as a model folder" if Path(path).exists() else "is no folder here and cannot be fetched"
    if isinstance(error, TypeError) and any("rope_theta" in x and x["rope_theta"] is None for x in _parts(path)):
        return UserError(
            f"model.path = {path!r} {what}: rope_theta is null in its config.json. Write the model's own base of "
            "rotary positions there, or fetch the file again."
        )
    return UserError(f"model.path = {path!r} {what}: {reason}. Give a Hugging Face folder or name, or leave it empty.")


def _parts(path: str) -> list[dict[str, Any]]:
    """Return config.json and the objects in it."""
    config = _read(path, "config.json") or {}
    return [config, *(part for part in config.values() if isinstance(part, dict))]


@contextmanager
def called(place: str) -> Iterator[None]:
    """Name a model in errors by its place on a command line, where it is no setting."""
    try:
        yield
    except UserError as e:
        raise UserError(str(e).replace("model.path =", f"{place} =", 1)) from e


def wrong_folder(path: str, why: str) -> UserError:
    """Return the error of a folder whose content is not a model that can be trained; `why` ends with the cure."""
    return UserError(f"model.path = {path!r} {why}")


def check_folder(path: str) -> None:
    """Raise UserError where `path` is no whole model: an adapter, a file, a folder of folders, a pointer, quantised.

    A name on the hub is checked as far as its files are here already.
    """
    folder = Path(path)
    if folder.is_file():
        raise wrong_folder(path, f"is a file. Give the folder that it lies in, {str(folder.parent)!r}.")
    _check_adapter(path)
    if not folder.exists() and _read(path, "config.json") is None:
        if not HUB_NAME.fullmatch(path):
            raise wrong_folder(
                path,
                "is no folder here, and a name on the hub is OWNER/NAME. Give a Hugging Face folder or such a name, or "
                f"leave it empty.{near_names(path)}",
            )
        if why := mistyped_path(path):
            raise wrong_folder(path, f"is no folder here: {why} To fetch a model of that name: `hf download {path}`.")
        _say_asking(path)
    if folder.is_dir():
        _check_pointers(folder)
        if not (folder / "config.json").exists():
            raise _no_config(folder)
    if (config := _read(path, "config.json")) is not None:
        _check_config(path, config)


def check_tokenizer_files(path: str) -> None:
    """Raise UserError where a folder has no tokenizer, or only a pointer to one."""
    folder = Path(path)
    if not folder.is_dir():
        return
    _check_pointers(folder)
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
        raise wrong_folder(
            path,
            "has no tokenizer (no tokenizer.json, tokenizer.model or vocab.json). Copy the tokenizer's files of the "
            "model that these weights come from: AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER).",
        )
    _check_code(path, "tokenizer_config.json", "AutoTokenizer")


def own_code(path: str, file: str, kind: str) -> str:
    """Return the Python file that a model's config file (`file`) names for `kind` (AutoConfig, ...), or ""."""
    named = (_read(path, file) or {}).get("auto_map")
    named = named.get(kind) if isinstance(named, dict) else named
    first = next((x for x in named if x), "") if isinstance(named, list) else named
    return f"{str(first).split('--')[-1].rpartition('.')[0]}.py" if first else ""


def needs_own_code(path: str, code: str) -> UserError:
    """Return the error of a model that transformers has no class for, and that brings Python code of its own."""
    return wrong_folder(
        path,
        f"needs Python code of its own ({code}), which is never run here: it could do anything on this machine. Choose "
        "a model of an architecture that transformers has, or convert it to one.",
    )


def _read(path: str, file: str) -> dict[str, Any] | None:
    """Read a small JSON file of a folder, or of a hub name that has been fetched; None where there is none.

    UserError where it is no JSON object.
    """
    found: Any = Path(path) / file
    if not Path(path).exists():
        try:
            found = try_to_load_from_cache(path, file)
        except ValueError:  # no name that the hub could have
            return None
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return None
    try:
        value = json.loads(Path(found).read_text(encoding="utf-8"), object_pairs_hook=without_repeats)
    except TwiceError as e:
        raise UserError(f"{found}: {e}, and only one of the two counts. Leave one out.") from e
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{found} cannot be read as JSON: {e}. Fetch or copy the file again.") from e
    if not isinstance(value, dict):
        raise UserError(f"{found} must hold a JSON object, and holds {type(value).__name__}. Fetch the file again.")
    return value


def read_json(path: str, file: str) -> dict[str, Any] | None:
    """Read a JSON file of a model, as `check_folder` does: None where there is none, UserError where it is damaged."""
    return _read(path, file)


def _check_adapter(path: str) -> None:
    adapter = _read(path, "adapter_config.json")
    alone = not (Path(path) / "config.json").exists()
    if adapter is None and alone and Path(path).is_dir():
        adapter = {} if [*Path(path).glob("adapter_model*")] else None
    if adapter is None:
        return
    if (Path(path) / "trainer").is_dir() and alone:
        raise wrong_folder(
            path,
            "is a checkpoint of a run with model.lora: an adapter, not a whole model. To go on with it, name it in "
            "trainer.resume, with the model.path and model.lora of its run; to train what it has become, export it "
            f"(python -m gspo.export {path} FOLDER) and give FOLDER.",
        )
    base = adapter.get("base_model_name_or_path")
    of = f" of {base}" if base else ""
    merge = (
        "Merge it: peft.AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(FOLDER), "
        "copy the tokenizer's files, and give FOLDER"
    )
    if Path(path).is_dir() and not alone:
        raise wrong_folder(
            path,
            f"holds a model and beside it an adapter{of} (adapter_config.json), and does not say whether the adapter "
            f"is in the weights. {merge}; or move the adapter's files away, if it is merged already.",
        )
    raise wrong_folder(path, f"is an adapter{of}, not a whole model (adapter_config.json). {merge}.")


def _check_pointers(folder: Path) -> None:
    """Raise UserError for files that git-lfs has not fetched, for empty ones, and for what is no file but a pipe."""
    for file in sorted(folder.iterdir()):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise wrong_folder(str(folder), f"has {file.name}, which is a pipe or a device. Fetch or copy it again.")
    for pattern in (*WEIGHTS, *TOKENIZERS, "*.json"):
        for file in sorted(folder.glob(pattern)):
            if file.is_symlink() and not file.exists():
                raise wrong_folder(str(folder), f"has {file.name} as a link to a file that is gone. Fetch it again.")
            if not file.is_file() or file.stat().st_size > 1024:
                continue
            if file.read_bytes().startswith(POINTER):
                raise wrong_folder(
                    str(folder),
                    f"has {file.name} only as a git-lfs pointer, not the file itself. Run `git lfs install` and "
                    "`git lfs pull` in that folder, or fetch it with `hf download`.",
                )
            if file.stat().st_size == 0:
                raise wrong_folder(str(folder), f"has {file.name} with nothing in it. Fetch or copy it again.")


def _no_config(folder: Path) -> UserError:
    """Return the error of a folder without config.json, which names what it seems to be."""
    inside = sorted(x.parent for x in [*folder.glob("*/config.json"), *folder.glob("checkpoints/*/config.json")])
    if inside:
        return wrong_folder(
            str(folder), f"has no config.json, but {len(inside)} of its folders do. Give one: {str(inside[-1])!r}."
        )
    gguf = next(folder.glob("*.gguf"), None)
    if gguf:
        return wrong_folder(
            str(folder),
            f"holds {gguf.name}: GGUF files are for inference. Give the Hugging Face folder that it was made from.",
        )
    return wrong_folder(
        str(folder), "has no config.json. Give the folder that `save_pretrained` or `hf download` wrote, or a hub name."
    )


def _check_config(path: str, config: dict[str, Any]) -> None:
    """Raise UserError for quantised models, sizes that no model has, and models that need code of their own."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for key, most in MOST.items():  # transformers would build such a model for hours, or until memory ends
        for part in parts:
            size = part.get(key)
            least = 1 if part is config and "experts" not in key else 0
            if isinstance(size, int | float) and not least <= size <= most:
                raise wrong_folder(
                    path, f"has {key} = {size} in config.json; it can be {least} to {most:,}. Fetch or copy it again."
                )
    for key in QUANTISED:
        found = next((part[key] for part in parts if part.get(key)), None)
        if found is not None:
            kind = found.get("quant_method") or found.get("quant_algo") if isinstance(found, dict) else None
            raise quantised(path, f"{key} in config.json" + (f": {kind}" if kind else ""))
    for part in parts:
        _check_dtype(path, part)
    _check_code(path, "config.json", "AutoConfig", "AutoModelForCausalLM")


def _check_dtype(path: str, config: dict[str, Any]) -> None:
    """Raise UserError where config.json names a number format that no model is trained from."""
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    value = config.get(key)
    if value is not None and str(value).removeprefix("torch.") not in FLOATS:
        raise wrong_folder(
            path,
            f"has {key} = {value!r} in its config.json, and a model is trained from float32, bfloat16 or float16. If "
            "its files hold weights of such a type, write that type there. If they are quantised, dequantize them with "
            "what quantised them and save the model in bfloat16, or give the checkpoint that they were made from.",
        )


def quantised(path: str, sign: str) -> UserError:
    """Return the error of quantised weights; `sign` is what shows it."""
    return wrong_folder(
        path,
        f"holds quantised weights ({sign}), which have no gradient. Give the model as it was before it was quantised, "
        "in float32, bfloat16 or float16.",
    )


def _check_code(path: str, file: str, *kinds: str) -> None:
    """Raise UserError where a config file names code of the model's own, and transformers has no class for it."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    code = next((found for kind in reversed(kinds) if (found := own_code(path, file, kind))), "")
    config = _read(path, file) or {}
    if file == "config.json":
        known = config.get("model_type") in CONFIG_MAPPING
    else:
        name = config.get("tokenizer_class")
        known = name is None or tokenizer_class_from_name(name) is not None
    if code and not known:
        raise needs_own_code(path, code)
    if code:
        _say_not_run(path, code)


@cache
def _say_asking(path: str) -> None:
    say(f"no folder {path} here; asking the hub")


@cache
def _say_not_run(path: str, code: str) -> None:
    say(f"note: {path}: its own {code} is never run; transformers' own class for its model_type is used.")

"""Export a checkpoint as a Hugging Face folder to share: verified, in few files, in bf16 if wanted. No GPU.

    python -m gspo.export outputs/checkpoints my-model [--dtype bf16] [--max_shard_gb 5]
    python -m gspo.export outputs/checkpoints my-adapter --adapter

CHECKPOINT is a checkpoint; or a run or a folder of checkpoints, of which the newest is exported, and with /best behind
it the best on held-out prompts; or any Hugging Face folder. An adapter (model.lora) is merged into its base, in float32
unless --dtype says otherwise; with --adapter it is written as peft's folder, for PeftModel.from_pretrained. A run's
checkpoint gets a model card, README.md. Memory: at most the tensors of one output file.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from gspo.checkpoint import manifest
from gspo.checkpoint.adapter_checkpoints import CONFIG, MergedWeights, open_adapter
from gspo.checkpoint.find_runs import BEST, best_checkpoint, checkpoint_of
from gspo.checkpoint.hf_folder import index_json, json_bytes, shard_files
from gspo.command_line import parse_arguments
from gspo.distributed.adapters import FILE
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.model_card import model_card
from gspo.models.loading import check_weights
from gspo.models.model_folder import called, check_folder
from gspo.models.safetensors_files import Weights, open_weights, stored_folder, write_weights
from gspo.models.stored_weights import refuse_non_finite
from gspo.read_paths import check_path, home_path
from gspo.system.console import say
from gspo.system.files import replacing, write_text
from gspo.system.help_text import HelpText
from gspo.system.program import guarded

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COPIED = (  # what `save_pretrained` writes, and what describes a model
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY.md"),
)
ONE_PROCESS = World(0, 1, torch.device("cpu"), None)


def export(
    checkpoint: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    as_adapter: bool = False,
) -> Path:
    """Write `folder`, whole or not at all. Return the checkpoint that was exported.

    An adapter is merged into its base, or written `as_adapter`. UserError when the checkpoint is damaged, the folder is
    not empty or lies among checkpoints, or the disk is full.
    """
    check_path(str(checkpoint), "CHECKPOINT")
    check_path(str(folder), "DIR", written=True)
    source = Path(checkpoint_of(checkpoint))
    _check_source(source, named=source == home_path(checkpoint))
    _check_target(folder, source)
    parts = _parts_of(source, as_adapter, dtype, shard_bytes)
    try:
        with replacing(folder) as part:
            part.mkdir(parents=True)
            for known in parts.described_in:
                _copy_known(known, part, as_adapter)
            library = "peft" if as_adapter else "transformers"
            if not (source / "README.md").exists() and (card := model_card(source, library)):
                write_text(part / "README.md", card)  # in place of that of an adapter's base
            _write(part, source, parts)
            _verify(part, parts)
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {e.strerror or e}.") from e
    return source


@dataclass(frozen=True)
class _Parts:
    """What is exported."""

    weights: Weights | MergedWeights
    dtype: torch.dtype | None  # of the floating-point tensors that are written; None: their own
    shard_bytes: int  # of one file, at most
    described_in: list[Path]  # folders with config.json, tokenizer and the like; the last has the last word
    stem: str = "model"  # of the files of weights


def _parts_of(source: Path, as_adapter: bool, dtype: torch.dtype | None, shard_bytes: int) -> _Parts:
    """Return what is exported of a checkpoint or another model. UserError where its weights are not whole."""
    adapter = open_adapter(str(source))
    if adapter is None:
        if as_adapter:
            raise UserError(f"{source} is a whole model, no adapter: its run had no model.lora. Leave --adapter out.")
        check_weights(str(source))
        return _Parts(open_weights(source), dtype, shard_bytes, [source])
    check_weights(adapter.base)
    merged = MergedWeights(adapter)  # also for an adapter alone: it must fit its base
    if as_adapter:
        return _Parts(adapter.weights, dtype, 2**62, [source], FILE)
    return _Parts(merged, dtype or torch.float32, shard_bytes, [stored_folder(adapter.base), source])


def _copy_known(source: Path, part: Path, as_adapter: bool) -> None:
    """Copy the files that belong to a model, by name; say which others stay behind. UserError for links out of it.

    What else lies in a folder may be secret (.env), code, or pickled weights that are older than these.
    """
    left = []
    for file in sorted(source.iterdir()):
        if not file.is_file() or ".safetensors" in file.suffixes or file.name == manifest.NAME:
            continue
        if file.name == CONFIG and not as_adapter:  # merged
            continue
        if not any(fnmatch(file.name, pattern) for pattern in (*COPIED, CONFIG)):
            left.append(file.name)
            continue
        target = file.resolve()
        is_hub_cache = target.parent.name == "blobs" and target.parent.parent == source.resolve().parent.parent
        if file.is_symlink() and not target.is_relative_to(source.resolve()) and not is_hub_cache:
            raise UserError(f"{file} is a link to {target}, outside of the model. Put the file itself there.")
        shutil.copyfile(file, part / file.name)
    if left:
        say(f"not copied, as no part of a model that we know: {', '.join(left)}")


def _is_checkpoint(source: Path) -> bool:
    """Return whether a Hugging Face folder is a checkpoint of ours."""
    return (source / "trainer").exists()


def _check_source(source: Path, named: bool) -> None:
    """Raise UserError unless `source` is an undamaged checkpoint or a Hugging Face folder.

    A checkpoint that the user `named` may have no manifest.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist. Give a checkpoint, a run or a Hugging Face folder.")
    if not (source / CONFIG).exists() or (source / "config.json").exists():
        check_folder(str(source))
    if _is_checkpoint(source) and (damage := manifest.find_damage(source, ONE_PROCESS, required=not named)):
        raise UserError(f"{source} is damaged: {damage}. Export another checkpoint.")


def _check_target(folder: Path, source: Path) -> None:
    """Raise UserError if `folder` lies in the source or among checkpoints, or is not empty."""
    home = source.resolve().parent if _is_checkpoint(source) else source.resolve()
    if folder.resolve().is_relative_to(home):
        raise UserError(f"{folder} lies in {home}. Name a folder outside of it.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty. Name another folder.")


def _write(part: Path, source: Path, parts: _Parts) -> None:
    """Write the weights in files of limited size, their index, and the dtype into config.json."""
    weights, dtype = parts.weights, parts.dtype
    shards = list(_shards(weights, dtype, parts.shard_bytes))
    file_of, total = {}, 0
    for file, names in zip(shard_files(parts.stem, len(shards)), shards, strict=True):
        refuse_non_finite(str(source), ((name, weights.read(name)) for name in names))
        tensors = {name: _cast(weights.read(name), dtype) for name in names}
        _check_overflow(tensors, dtype)
        total += sum(x.nbytes for x in tensors.values())
        write_weights(part / file, tensors)
        file_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        (part / "model.safetensors.index.json").write_bytes(index_json(total, file_of))
    if dtype is not None and parts.stem == "model":
        try:
            config = json.loads((part / "config.json").read_text(encoding="utf-8")) | {"dtype": str(dtype)[6:]}
        except (ValueError, TypeError) as e:
            raise UserError(f"config.json of the model cannot be read: {e}. Export without --dtype.") from e
        (part / "config.json").write_bytes(json_bytes(config))


def _check_overflow(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    """Raise UserError where finite weights became infinite by the cast."""
    for name, x in tensors.items():
        if dtype is not None and x.is_floating_point() and not x.isfinite().all():
            raise UserError(f"--dtype: {name} has values that {str(dtype)[6:]} cannot hold. Export it as bf16 or fp32.")


def _shards(weights: Weights | MergedWeights, dtype: torch.dtype | None, max_bytes: int) -> Iterator[list[str]]:
    """Yield each file's tensor names, in order: at most `max_bytes` a file, unless one tensor alone is larger."""
    names, size = [], 0
    for name in weights.names:
        each = _cast(torch.empty(weights.shape(name), dtype=weights.dtype(name), device="meta"), dtype).nbytes
        if names and size + each > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += each
    yield names


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Cast floating-point tensors to `dtype`; None: keep every dtype."""
    return x if dtype is None or not x.is_floating_point() else x.to(dtype)


def _verify(part: Path, parts: _Parts) -> None:
    """Raise OSError unless every tensor reads back bit for bit."""
    written = open_weights(part, parts.stem)
    for name in parts.weights.names:
        found, expected = written.read(name), _cast(parts.weights.read(name), parts.dtype)
        same_bits = found.view(-1).view(torch.uint8).equal(expected.view(-1).view(torch.uint8))
        if found.dtype != expected.dtype or not same_bits:
            raise OSError(f"{name} does not read back as it was written")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gspo.export", description=__doc__, formatter_class=HelpText)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16 (default: unchanged)")
    parser.add_argument(
        "--max_shard_gb", type=float, default=5.0, help="largest file, in 10^9 bytes (default: %(default)s)"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="write the adapter of model.lora itself, as peft's folder, not merged"
    )
    args = parse_arguments(parser)
    if args.dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {args.dtype}: must be fp32, bf16 or fp16.")
    if not 0 < args.max_shard_gb < math.inf:
        raise UserError(f"--max_shard_gb {args.max_shard_gb:g}: must be a number above 0.")
    size, dtype = int(args.max_shard_gb * 1e9), DTYPES.get(args.dtype)
    with called("CHECKPOINT"):
        exported = export(args.checkpoint, args.folder, dtype, size, args.adapter)
    size = sum(file.stat().st_size for file in args.folder.iterdir())
    say(f"{exported} -> {args.folder}: {size / 1e6:.1f} MB, verified")
    best = best_checkpoint(exported.parent) if _is_checkpoint(exported) else None
    if best and best.name != exported.name:
        say(f"note: the best on held-out prompts is {best.name}: give {exported.parent / BEST} for that one.")
    if _is_checkpoint(exported) and (args.folder / "README.md").exists():
        say(f"{args.folder / 'README.md'} is the model card; read it before you publish it.")


if __name__ == "__main__":
    guarded(main)

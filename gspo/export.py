"""A checkpoint -> a Hugging Face folder to give away: verified, in few files, in bf16 if wanted. No GPU.

    python -m gspo.export outputs/checkpoints my-model [--dtype bf16] [--max_shard_gb 5]

CHECKPOINT is a checkpoint, a run or a folder of checkpoints (the newest is taken), or any Hugging Face folder. Tensors
are read one at a time; no more than a file of them is in memory.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gspo.checkpoint import manifest
from gspo.checkpoint.hf_folder import index_json, json_bytes, shard_files
from gspo.checkpoint.run_folder import latest_checkpoint
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.models.safetensors_files import Weights, open_weights, write_weights
from gspo.system.files import replacing
from gspo.system.program import guarded

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALONE = World(0, 1, torch.device("cpu"), None)


def export(checkpoint: Path, folder: Path, dtype: torch.dtype | None = None, shard_bytes: int = 5 * 10**9) -> Path:
    """Write `folder`, whole or not at all -> the checkpoint that was taken.

    UserError when the checkpoint is damaged, the folder is there and not empty or among checkpoints, or the disk is
    full.
    """
    source = latest_checkpoint(checkpoint) or latest_checkpoint(checkpoint / "checkpoints") or checkpoint
    if not source.exists():
        raise UserError(f"{source} is not there.")
    if not (source / "config.json").exists():
        raise UserError(f"{source} is neither a checkpoint nor a Hugging Face folder (no config.json in it).")
    ours = (source / "trainer").exists()
    if ours and (wrong := manifest.find_damage(source, ALONE, required=source != checkpoint)):
        raise UserError(f"{source} is damaged: {wrong}. Export another checkpoint.")
    home = source.resolve().parent if ours else source.resolve()
    if folder.resolve().is_relative_to(home):
        raise UserError(f"{folder} lies in {home}. Name a folder outside of it.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty. Name another folder.")
    weights = open_weights(source)
    try:
        with replacing(folder) as part:
            part.mkdir(parents=True)
            for file in source.iterdir():
                if file.is_file() and ".safetensors" not in file.suffixes and file.name != manifest.NAME:
                    shutil.copyfile(file, part / file.name)
            _write(part, weights, dtype, shard_bytes)
            _verify(part, weights, dtype)
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {e.strerror or e}.") from e
    return source


def _write(part: Path, weights: Weights, dtype: torch.dtype | None, shard_bytes: int) -> None:
    shards = list(_shards(weights, dtype, shard_bytes))
    places, total = {}, 0
    for file, names in zip(shard_files("model", len(shards)), shards, strict=True):
        tensors = {name: _cast(weights.read(name), dtype) for name in names}
        total += sum(x.nbytes for x in tensors.values())
        write_weights(part / file, tensors)
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        (part / "model.safetensors.index.json").write_bytes(index_json(total, places))
    if dtype is not None:
        try:
            config = json.loads((part / "config.json").read_text(encoding="utf-8")) | {"dtype": str(dtype)[6:]}
        except (ValueError, TypeError) as e:
            raise UserError(f"config.json of the model cannot be read: {e}.") from e
        (part / "config.json").write_bytes(json_bytes(config))


def _shards(weights: Weights, dtype: torch.dtype | None, most: int) -> Iterator[list[str]]:
    """The names of each file's tensors, in their order, at most so many bytes a file unless one tensor is larger."""
    names, size = [], 0
    for name in weights.names:
        each = _cast(torch.empty(weights.shape(name), dtype=weights.dtype(name), device="meta"), dtype).nbytes
        if names and size + each > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += each
    yield names


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None or not x.is_floating_point() else x.to(dtype)


def _verify(part: Path, weights: Weights, dtype: torch.dtype | None) -> None:
    """OSError unless every tensor reads back as it should be, bit for bit."""
    written = open_weights(part)
    for name in weights.names:
        mine, theirs = written.read(name), _cast(weights.read(name), dtype)
        if mine.dtype != theirs.dtype or not mine.view(-1).view(torch.uint8).equal(theirs.view(-1).view(torch.uint8)):
            raise OSError(f"{name} reads back other than it was written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("folder", type=Path, metavar="DIR", help="to be made")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16; default: as the checkpoint has it")
    parser.add_argument("--max_shard_gb", type=float, default=5.0, help="10^9 bytes a file (default %(default)s)")
    args = parser.parse_args()
    if args.dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {args.dtype}: must be fp32, bf16 or fp16.")
    if not 0 < args.max_shard_gb < math.inf:
        raise UserError(f"--max_shard_gb {args.max_shard_gb:g}: must be a number above 0.")
    taken = export(args.checkpoint, args.folder, DTYPES.get(args.dtype), int(args.max_shard_gb * 1e9))
    size = sum(file.stat().st_size for file in args.folder.iterdir())
    print(f"{taken} -> {args.folder}: {size / 1e6:.1f} MB, verified")


if __name__ == "__main__":
    guarded(main)

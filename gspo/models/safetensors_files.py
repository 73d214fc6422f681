"""Read the tensors of a folder's safetensors files by name and slice; write such files with a checksum."""

import hashlib
import json
import os
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gspo.errors import UserError

DTYPES = {  # as the format spells them, https://huggingface.co/docs/safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Weights:
    """The tensors of one or several safetensors files, by name; each is read only when `read` is called."""

    def __init__(self, files: dict[str, Path]):
        self._files, self._open = files, {}  # tensor -> its file; file -> its handle

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def spelled_dtype(self, name: str) -> str:
        """Return a tensor's type as the format spells it: also those that torch or we do not have."""
        return self._slice(name).get_dtype()

    def dtype(self, name: str) -> torch.dtype:
        return next(dtype for dtype, known in DTYPES.items() if known == self.spelled_dtype(name))

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> Tensor:
        """Return a tensor, or its part at `slices` (one a dimension), on the CPU.

        It is a view of the memory-mapped file, of which only the pages that are used come into memory. Copy it before
        changing it.
        """
        return self._slice(name)[slices] if slices else self._handle(name).get_tensor(name)

    def _slice(self, name: str):
        return self._handle(name).get_slice(name)

    def _handle(self, name: str):
        file = self._files[name]
        if file not in self._open:
            self._open[file] = _opened(file)
        return self._open[file]


def stored_folder(path: str) -> Path | None:
    """Return the folder that holds a model's safetensors files: `path`, or what was fetched of a name on the hub.

    None where there are none: it holds weights of another kind, or nothing has been fetched yet.
    """
    folder = Path(path)
    if not folder.is_dir():
        try:
            found = try_to_load_from_cache(path, "config.json")
        except ValueError:  # no name that the hub could have
            return None
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    stored = [folder / "model.safetensors", folder / "model.safetensors.index.json"]
    return folder if any(map(Path.exists, stored)) else None


def open_weights(folder: Path, stem: str = "model") -> Weights:
    """Open `<stem>.safetensors` of a folder, or the shards that `<stem>.safetensors.index.json` lists.

    Raises UserError where there is neither, or both, or a file is damaged.
    """
    folder = Path(folder)
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.exists():
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: folder / file for name, file in where.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"{index} is no index of safetensors files: {e}.") from e
        if gone := sorted({file.name for file in files.values() if not file.exists()}):
            raise UserError(f"{index} names {', '.join(gone[:4])}, which is not there. Fetch all its files.")
        if single.exists() and single not in files.values():
            raise UserError(
                f"{folder} has {single.name} and beside it {index.name} of other files: two sets of weights. Delete "
                "the one that is not meant."
            )
        return Weights(files)
    if not single.exists():
        raise UserError(f"{folder} has no {single.name}, nor an index of several such files.")
    return Weights(dict.fromkeys(_opened(single).keys(), single))


def _opened(file: Path):
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as e:
        raise UserError(f"{file} is no whole safetensors file: {e}. Fetch or copy it again.") from e


def write_weights(file: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Write whole CPU tensors as a safetensors file, down to the disk -> (bytes, their sha256). OSError if it fails.

    One pass over the tensors as they lie in memory, so the checksum is of what was meant, not of what arrived.
    """
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return write_bytes(file, [len(text).to_bytes(8, "little"), text, *map(_bytes, tensors.values())])


def write_bytes(file: Path, pieces: list[bytes | memoryview]) -> tuple[int, str]:
    """Write a file down to the disk -> (bytes, their sha256). OSError if it fails."""
    digest, size = hashlib.sha256(), 0
    with file.open("wb", buffering=0) as f:
        for piece in pieces:
            view = memoryview(piece).cast("B") if len(piece) else memoryview(b"")
            for start in range(0, len(view), 1 << 24):
                chunk = view[start : start + (1 << 24)]
                digest.update(chunk)
                while len(chunk):
                    chunk = chunk[f.write(chunk) :]
            size += len(view)
        os.fsync(f.fileno())
    return size, digest.hexdigest()


def _bytes(x: Tensor) -> memoryview:
    assert x.device.type == "cpu" and x.is_contiguous()
    return memoryview(x.view(-1).view(torch.uint8).numpy()) if x.numel() else memoryview(b"")

"""Write and check `manifest.json`: size and sha256 of every file of a checkpoint, to find a damaged one.

It is written last, and has a checksum of its own.
"""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from gspo.distributed.world import World, split_by_size
from gspo.models.safetensors_files import write_bytes

NAME = "manifest.json"
Files = dict[str, tuple[int, str]]  # path inside the checkpoint -> (bytes, sha256)


def _text(files: Files) -> str:
    """Return the content of manifest.json for `files`."""
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
    own = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return json.dumps({"format": 1, "files": listed, "sha256": own}, indent=1, ensure_ascii=False) + "\n"


def write(checkpoint: Path, files: Files) -> None:
    """Write the manifest and flush it to the disk. OSError if that fails, or a file does not have the given size."""
    for name, (size, _) in files.items():
        if not (checkpoint / name).is_file() or (checkpoint / name).stat().st_size != size:
            raise OSError(f"{checkpoint / name} is missing or too short: do all nodes share this folder?")
    write_bytes(checkpoint / NAME, [_text(files).encode()])


def find_damage(checkpoint: Path, world: World, required: bool = True) -> str:
    """Return what is wrong with a checkpoint, in a few words, or "" if every file is as it was written.

    All ranks call it together; each reads its share of the files. Where a manifest is not `required`, a checkpoint
    without one (edited by hand) is only checked for state.json and for complete safetensors files.
    """
    files, wrong = world.broadcast_from_main(lambda: _read(checkpoint, required))
    mine = split_by_size({name: size for name, (size, _) in files.items()}, world.size)[world.rank]
    found = [problem for name in mine if (problem := _problem(checkpoint / name, name, *files[name]))]
    found = [problem for of_rank in world.gather(found) for problem in of_rank]
    more = f" (and {len(found) - 1} more files)" if len(found) > 1 else ""
    return wrong or (min(found) + more if found else "")


def _read(checkpoint: Path, required: bool) -> tuple[Files, str]:
    """Read the manifest. Return (the files it lists, what is wrong with the manifest itself or "")."""
    if not (checkpoint / NAME).exists():
        return {}, f"it has no {NAME}" if required else _damage_without_manifest(checkpoint)
    try:
        text = (checkpoint / NAME).read_text(encoding="utf-8")
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in json.loads(text)["files"].items()}
        if text != _text(files):
            return {}, f"{NAME} has changed since it was written"
        odd = next((name for name, entry in files.items() if not _is_listed_well(name, *entry)), None)
        return (files, "") if odd is None else ({}, f"{NAME} lists {odd!r:.60}, which no checkpoint has")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        return {}, f"{NAME} cannot be read ({type(e).__name__})"


def _is_listed_well(name: str, size: Any, digest: Any) -> bool:
    """Return whether this is a file inside the checkpoint with its size and sha256: whoever changes a checkpoint can
    write a manifest that leads anywhere, also to files without end."""
    inside = PurePosixPath(name).parts and not {"/", ".."} & {*PurePosixPath(name).parts}
    return bool(inside) and type(size) is int and 0 <= size < 2**63 and isinstance(digest, str)


def _problem(file: Path, name: str, size: int, digest: str) -> str:
    """Return how a file differs from its size and sha256 in the manifest, or ""."""
    try:
        if not file.exists():
            return f"{name} is missing"
        if not file.is_file():
            return f"{name} is no file"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        return "" if _sha256(file) == digest else f"{name} has changed"
    except OSError as e:
        return f"{name} cannot be read ({e.strerror})"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as f:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _damage_without_manifest(checkpoint: Path) -> str:
    """Return what is wrong with state.json or the headers of the safetensors files, or ""."""
    try:
        state, weights = checkpoint / "trainer" / "state.json", [*checkpoint.rglob("*.safetensors")]
        if other := next((file for file in (state, *weights) if file.exists() and not file.is_file()), None):
            return f"{other.relative_to(checkpoint)} is no file"
        json.loads(state.read_text(encoding="utf-8"))
        for file in weights:
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, RecursionError, SafetensorError) as e:
        return f"it has no {NAME}, and {' '.join(str(e).split())}"
    return "" if weights else f"it has no {NAME} and no weights"

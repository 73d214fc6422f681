"""Recognize data, model and chat template of a run by their content, wherever they are and however they are named."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from gspo.models.loading import resolve_path
from gspo.system.files import write_json

NAME = "fingerprints.json"  # in the run's folder: parameter -> fingerprint
WHOLE = 1 << 20  # files up to so many bytes are read whole
BLOCK, BLOCKS = 1 << 12, 256  # of a larger one, so many blocks of so many bytes, evenly spread, the last one included

Fingerprints = dict[str, str]  # parameter, such as data.train_files -> `<rows> rows <digest>`, or a digest


def of_model(path: str | None) -> str:
    """Return the fingerprint of a model folder or hub name: its configuration, tokenizer, and samples of its weights.

    Empty where its files are not found. Weights that were trained differ in every block.
    """
    folder = Path(resolve_path(path))
    if not folder.is_dir():
        try:
            folder = Path(cached_file(str(folder), "config.json", local_files_only=True)).parent
        except (OSError, ValueError):
            return ""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(
        [folder / "config.json", folder / "tokenizer.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]
    ):
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            _add_content(digest, file)
    return digest.hexdigest()


def of_source(text: str) -> str:
    """Return the fingerprint of a reward function's source text."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def of_template(tokenizer: Any) -> str:
    """Return the fingerprint of the chat template that a tokenizer has, its own or a file's; "" where it has none."""
    template = tokenizer.chat_template
    return of_source(template if isinstance(template, str) else repr(template)) if template else ""


def _add_content(digest: "hashlib._Hash", file: Path) -> None:
    """Add a file's bytes, or blocks of them, to the digest."""
    size = file.stat().st_size
    with file.open("rb") as f:
        if size <= WHOLE:
            digest.update(f.read())
            return
        for k in range(BLOCKS):
            f.seek((size - BLOCK) * k // (BLOCKS - 1))
            digest.update(f.read(BLOCK))


def read(folder: Path) -> Fingerprints:
    """Return the fingerprints that a run has kept; none where an older version wrote the folder."""
    try:
        file = folder / NAME
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None  # a pipe would be waited for
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def write(folder: Path, fingerprints: Fingerprints) -> None:
    """Keep the fingerprints of a run. OSError where they cannot be written."""
    write_json(folder / NAME, fingerprints)

"""Declare one parameter of the configuration."""

from dataclasses import field
from typing import Any


def opt(default: Any, help: str, path: bool = False, **bounds: float) -> Any:
    """Declare a parameter: default, meaning, whether it is a path, and optional bounds `ge`, `gt`, `le`, `lt`."""
    metadata = {"help": help, "path": path, **bounds}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)

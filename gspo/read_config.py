"""Read the configuration: defaults <- YAML file <- `section.key=value` arguments, every key and value checked.

`load_config(path, overrides)` is the only way in. An unknown key is an error that names the nearest known one.
"""

import dataclasses
import difflib
import math
import operator
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from gspo.config import PARAMETERS, Config, known_keys
from gspo.config_aliases import ALIASES, VALUE_ALIASES
from gspo.errors import UserError

ROOM = Path(__file__).resolve().parent
PRESETS = next(folder for folder in (ROOM / "configs", ROOM.parent / "configs") if folder.is_dir())  # installed, or not
STANDARD = os.path.relpath(PRESETS / "standard.yaml")


def parameter_of(typed: str, place: str) -> str:
    """Return the `section.name` that was meant. Raise UserError with the nearest known name for an unknown one."""
    key = typed.lstrip("+")  # Hydra, which verl uses, wants `+` before a new key
    if key in ALIASES:
        return ALIASES[key]
    if key in PARAMETERS:
        return key
    near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.0)
    raise UserError(f"{place}: unknown key {key!r}; did you mean {near[0]!r}? `python -m gspo.config` lists every key.")


def _type_name(kind: Any) -> str:
    """Return the type as an error message names it."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(kind) or (kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", ""))


def _number(value: Any, kind: type) -> int | float | None:
    """Return `value` as a finite number of this kind, int or float; None where it is none."""
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        return None
    try:  # a text may be a number: YAML 1.1 reads 1e-6 as a text
        number = float(value)
        if kind is float:
            return number if math.isfinite(number) else None
        if number != int(number):
            return None
        return value if isinstance(value, int) else int(number)  # a large int would lose digits as a float
    except (ValueError, OverflowError):
        return None


def coerce(value: Any, kind: Any, key: str, place: str, also: tuple[Any, ...] = ()) -> Any:
    """Return `value` as the parameter's type `kind`. Raise UserError where it has none (`also`: further values)."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # only `X | None` and `X | Literal[...]` occur
        if value is None and args[1] is types.NoneType or value in typing.get_args(args[1]):
            return value
        return coerce(value, args[0], key, place, also=typing.get_args(args[1]))
    if kind in (int, float) and (number := _number(value, kind)) is not None:
        return number
    if (origin is Literal and value in args) or (kind is bool and isinstance(value, bool)):
        return value
    if kind is str and isinstance(value, str | int | float):
        return str(value)
    if origin is list:
        items = [] if value is None else value if isinstance(value, list) else [value]
        return [coerce(item, args[0], key, place) for item in items]
    if origin is dict and isinstance(value, dict):
        return value
    expected = f"one of {', '.join(map(str, args))}" if origin is Literal else _type_name(kind)
    expected = " or ".join([expected, *map(str, also)])
    raise UserError(f"{place}: {key} = {value!r} is not {expected}.")


BOUNDS = {"ge": (">=", operator.ge), "gt": (">", operator.gt), "le": ("<=", operator.le), "lt": ("<", operator.lt)}


def _check_bounds(value: Any, f: dataclasses.Field, key: str, place: str) -> None:
    """Raise UserError where a number is out of the parameter's range."""
    if not isinstance(value, int | float):
        return
    for name, (sign, holds) in BOUNDS.items():
        bound = f.metadata.get(name)
        if bound is not None and not holds(value, bound):
            cure = " One response per prompt makes no pair: nothing to learn from." if key == "rollout.n" else ""
            raise UserError(f"{place}: {key} = {value} is out of range, it must be {sign} {bound}.{cure}")


def set_value(config: Config, typed: str, value: Any, place: str) -> None:
    """Set one parameter, named by its key or an alias, after checking type and range. Raise UserError."""
    key = parameter_of(typed, place)
    if isinstance(value, str | int):
        value = VALUE_ALIASES.get((key, value), value)
    f = PARAMETERS[key]
    value = coerce(value, f.type, key, place)
    _check_bounds(value, f, key, place)
    section, name = key.split(".")
    setattr(getattr(config, section), name, value)


def _leaves(tree: dict, prefix: str = "") -> list[tuple[str, Any]]:
    """Return the dotted keys of a YAML tree with their values; a mapping that is itself a value stays whole."""
    found = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        is_leaf = key in PARAMETERS or key in ALIASES
        if isinstance(value, dict) and not is_leaf:
            found += _leaves(value, f"{key}.")
        elif value is None and not is_leaf and any(k.startswith(f"{key}.") for k in known_keys()):
            continue  # a section with nothing in it
        else:
            found.append((key, value))
    return found


def read_yaml(path: Path) -> dict:
    """Return the file's YAML mapping. Raise UserError where it is missing or holds something else."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(
            f"--config {path}: {e.strerror or e}. Presets: {os.path.relpath(PRESETS)}/quick.yaml, "
            "standard.yaml and high_quality.yaml."
        ) from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(tree, dict | None):
        raise UserError(f"--config {path} holds a {type(tree).__name__}, not a mapping of sections.")
    return tree or {}


def _typed(key: str, text: str) -> Any:
    """Return what was typed after the equals sign, read as YAML; a text parameter takes it as it is."""
    kind = PARAMETERS[parameter_of(key, "command line")].type
    if not text or text == "null":
        return None
    if kind in (str, str | None):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Return the defaults, overwritten by the YAML file, overwritten by `section.name=value` texts. Raise UserError."""
    config = Config()
    if path is not None:
        for key, value in _leaves(read_yaml(Path(path))):
            set_value(config, key, value, str(path))
        config.trainer.run_name = config.trainer.run_name or Path(path).stem
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"command line: {item!r} is not of the form section.key=value.")
        set_value(config, key, _typed(key, text), "command line")
    name = config.trainer.run_name = config.trainer.run_name or "run"
    if Path(name).name != name or name in ("checkpoints", ".."):
        raise UserError(f"trainer.run_name = {name!r} must be a plain folder name, and not 'checkpoints'.")
    return config

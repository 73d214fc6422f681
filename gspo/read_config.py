"""Read the configuration: defaults <- YAML file <- `section.key=value` arguments, every key and value checked.

`load_config(path, overrides)` is the only way in. An unknown key is an error that names the nearest known one.
`objective.form` is one setting for several: they are set last, and nothing else may set them otherwise.
"""

import contextlib
import dataclasses
import difflib
import math
import operator
import os
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import yaml

from gspo.config import PARAMETERS, Config, known_keys
from gspo.config_aliases import ALIASES, FORMS, VALUE_ALIASES
from gspo.errors import UserError
from gspo.foreign_settings import LATER, Settings, is_foreign, set_later, translate
from gspo.read_paths import check_path, home_path, require_file
from gspo.read_yaml import TwiceError, Written, parse_json, parse_yaml, plain

ROOM = Path(__file__).resolve().parent
PRESETS = next(folder for folder in (ROOM / "configs", ROOM.parent / "configs") if folder.is_dir())  # installed, or not
STANDARD = os.path.relpath(PRESETS / "standard.yaml")
LIKELY = 0.7  # of a guess at an unknown name; a worse one would lead astray
MAY_BE_EMPTY = ("data.system_prompt",)  # an empty system message stands in for the chat template's own


def find_parameter(typed: str, place: str) -> tuple[str, tuple[str, ...]]:
    """Return the `section.name` that was meant, and the keys inside it where it is a mapping: `reward.reward_kwargs.k`.

    Raise UserError with the nearest known name for an unknown one.
    """
    key = typed.lstrip("+")  # Hydra, which verl uses, wants `+` before a new key
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        name, inside = ".".join(parts[:length]), tuple(parts[length:])
        name = ALIASES.get(name, name)
        is_mapping = name in PARAMETERS and typing.get_origin(PARAMETERS[name].type) is dict
        if name in PARAMETERS and (not inside or (is_mapping and all(inside))):
            return name, inside
    inside = [known for known in PARAMETERS if known.startswith(f"{key}.")]
    if inside:
        raise UserError(f"{place}: {key!r} is a section; name a parameter in it: {', '.join(inside[:3])}, ...")
    near = near_parameters(key)
    guess = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    raise UserError(f"{place}: unknown key {key!r}{guess} `python -m gspo.parameters` lists every key.")


def near_parameters(key: str) -> list[str]:
    """Return up to three names that an unknown one may be meant for."""
    near = [known for known in PARAMETERS if known.split(".")[1] == key]  # only its section was left out
    parts = key.split(".")
    alike = [known for known in known_keys() if _like(parts[-1], known.rpartition(".")[2])]
    near = near or difflib.get_close_matches(key, alike, n=1, cutoff=LIKELY)
    if len(parts) < 3:  # of verl's long names a word is no hint
        near = near or [known for known in PARAMETERS if parts[-1] in known.split(".")[1].split("_")]
    return near[:3]


def _like(typed: str, known: str) -> bool:
    """Return whether the last part of a name may be the other misspelt; two letters are too few to compare."""
    return len(typed) < 3 or difflib.SequenceMatcher(None, typed, known).ratio() >= LIKELY


def require_known(names: list[tuple[str, str]]) -> None:
    """Raise UserError where names, each with its place, are unknown: one error for all of them."""
    errors = []
    for typed, place in names:
        try:
            if not is_foreign(typed):
                find_parameter(typed, place)
        except UserError as e:
            errors.append(str(e))
    if len(errors) > 1:
        lists = " `python -m gspo.parameters` lists every key."
        raise UserError(" ".join(e.removesuffix(lists) for e in errors) + lists)
    if errors:
        raise UserError(errors[0])


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
    if isinstance(value, Written) and origin is not list:
        value = value.text if kind in (str, str | None) else value.value
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
        return plain(value)
    expected = f"one of {', '.join(map(str, args))}" if origin is Literal else _type_name(kind)
    expected = " or ".join([expected, *map(str, also)])
    raise UserError(f"{place}: {key} = {plain(value)!r} is not {expected}.")


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


def _check_text(text: str, is_path: bool, key: str, place: str) -> str:
    """Return a text; of a path the quotes around it left out and `~` expanded.

    Raise UserError where it is empty, Python's None, or names a shell's variable.
    """
    if (not text or (is_path and text.isspace())) and key not in MAY_BE_EMPTY:
        raise UserError(f"{place}: {key} has an empty text; leave it out, or write null for what is not set.")
    if text == "None":
        raise UserError(f"{place}: {key} = 'None': what is not set is written null. A file of that name is './None'.")
    if not is_path:
        return text
    if text[0] == text[-1] in "'\"" and len(text) > 2:  # quotes that a shell was to take away, as YAML does
        text = text[1:-1]
    if re.match(r"\$\w|.*\$\{", text):
        raise UserError(f"{place}: {key} = {text!r}: variables are not replaced here; write the path itself.")
    check_path(text, f"{place}: {key}")
    return os.path.expanduser(text)


def set_value(config: Config, typed: str, value: Any, place: str) -> str:
    """Set one parameter, named by its key or an alias, or a key inside one, after checking type and range.

    Return its key. Raise UserError.
    """
    key, inside = find_parameter(typed, place)
    f, (section, name) = PARAMETERS[key], key.split(".")
    if inside:
        inner = getattr(getattr(config, section), name)
        for part in inside[:-1]:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise UserError(f"{place}: {typed}: {part!r} is set to {inner!r:.60}, so nothing can be set inside it.")
        inner[inside[-1]] = plain(value)
        return key
    if plain(value) is None and (key, None) in VALUE_ALIASES:
        value = VALUE_ALIASES[key, None]
    value = coerce(value, f.type, key, place)
    if isinstance(value, str | int | float):
        value = VALUE_ALIASES.get((key, value), value)
    _check_bounds(value, f, key, place)
    is_path = bool(f.metadata.get("path"))
    if isinstance(value, str):
        value = _check_text(value, is_path, key, place)
    elif isinstance(value, list):
        value = [_check_text(item, is_path, key, place) if isinstance(item, str) else item for item in value]
    setattr(getattr(config, section), name, value)
    return key


def apply_form(config: Config, places: dict[str, str]) -> None:
    """Set what `objective.form` stands for; places: parameter -> where it was set. UserError where one contradicts."""
    form = config.objective.form
    for key, meant in FORMS[form].items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if key in places and value != meant:
            raise UserError(
                f"{places[key]}: {key} = {value!r} contradicts objective.form = {form}, which stands for {key} = "
                f"{meant!r}. Leave one of the two out; with objective.form=default every setting counts as it stands."
            )
        setattr(getattr(config, section), name, meant)


def _leaves(tree: dict, prefix: str = "") -> list[tuple[str, Any]]:
    """Return the dotted keys of a YAML tree with their values; a mapping that is itself a value stays whole."""
    found = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        parameter = ALIASES.get(key, key)
        is_leaf = parameter in PARAMETERS
        if isinstance(value, dict) and key in ALIASES and typing.get_origin(PARAMETERS[parameter].type) is not dict:
            is_leaf = False  # verl's section `algorithm`, whose name is also one of the original description's
        if isinstance(value, dict) and not is_leaf:
            found += _leaves(value, f"{key}.")
        elif value is None and not is_leaf and any(k.startswith(f"{key}.") for k in known_keys()):
            continue  # a section with nothing in it
        else:
            found.append((key, value))
    return found


def find_config(name: str | Path) -> Path:
    """Return the file that was named: a path, or, where there is no such file, a preset's name without its .yaml."""
    check_path(str(name), "--config")
    path, preset = home_path(name), PRESETS / f"{name}.yaml"
    return preset if not path.is_file() and len(path.parts) == 1 and preset.is_file() else path


def read_file(path: Path) -> dict:
    """Return the mapping in a YAML or JSON file. Raise UserError where it is missing or holds something else."""
    kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
    try:
        require_file(path, "--config")
        text = path.read_text(encoding="utf-8-sig")
        tree = parse_json(text) if kind == "JSON" else parse_yaml(text)
    except OSError as e:
        *others, last = sorted(preset.stem for preset in PRESETS.glob("*.yaml"))
        raise UserError(
            f"--config {path}: {e.strerror or e}. Give a YAML file, or the name of a preset in "
            f"{os.path.relpath(PRESETS)}: {', '.join(others)} or {last}."
        ) from e
    except TwiceError as e:
        raise UserError(f"--config {path}: {e}. One of the two would be lost: leave one out.") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f"--config {path} is not valid {kind}: {' '.join(str(e).split())}") from e
    if not isinstance(tree, dict | None):
        raise UserError(f"--config {path} holds a {type(plain(tree)).__name__}, not a mapping of sections.")
    return tree or {}


@dataclasses.dataclass
class Foreign:
    """What foreign settings leave behind: what can only be set at the end, and what is to be said about them."""

    later: Settings = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def ours(typed: str, value: Any, place: str, foreign: Foreign) -> list[tuple[str, Any]]:
    """Return a setting under our names: none, one or several where it is a foreign one."""
    if not is_foreign(typed):
        return [(typed, value)]
    found = translate(typed, value, place, foreign.notes)
    foreign.later |= {name: x for name, x in found.items() if name in LATER}
    return [(name, x) for name, x in found.items() if name not in LATER]


def _set_from_file(config: Config, leaves: list[tuple[str, Any]], path: Path, foreign: Foreign) -> dict[str, str]:
    """Set what the file says, its dotted keys with their values; return {parameter: the file}. Raise UserError where it
    says one thing twice, by different names."""
    seen: dict[tuple[str, ...], str] = {}
    for typed, value in [setting for leaf in leaves for setting in ours(*leaf, str(path), foreign)]:
        key, inside = find_parameter(typed, str(path))
        names = [(key, *inside)]
        if isinstance(value, dict):
            names += [(key, *inside, name) for name in value]
        for name in names:
            if name in seen:
                raise UserError(
                    f"{path}: {typed} and {seen[name]} set the same parameter, {'.'.join(name)}; leave one out."
                )
        seen |= dict.fromkeys(names, typed)
        set_value(config, typed, value, str(path))
    return {names[0]: str(path) for names in seen}


def _set_from_command_line(config: Config, typed: str, value: Any, places: dict[str, str], notes: list[str]) -> None:
    """Set one parameter; of one that is given twice, note which value counts: the last."""
    place = "command line"
    section, name = find_parameter(typed, place)[0].split(".")
    lost = getattr(getattr(config, section), name)
    key = set_value(config, typed, value, place)
    counts = getattr(getattr(config, section), name)
    if places.get(key) == place and counts != lost and not isinstance(counts, dict):
        notes.append(f"note, {place}: {key} is given twice; {counts!r} counts, not {lost!r}.")
    places[key] = place


def _typed(item: str) -> tuple[str, Any]:
    """Return key and value of `section.name=value`, the value read as YAML; a text parameter takes it as it is."""
    key, equals, text = item.partition("=")
    if not equals:
        meant = ""
        with contextlib.suppress(UserError):  # no path either
            meant = f" Is --config {item} meant?" if find_config(item).is_file() else ""
        raise UserError(f"command line: {item!r} is not of the form section.key=value.{meant}")
    name, inside = (key, ()) if is_foreign(key) else find_parameter(key, "command line")
    kind = PARAMETERS[name].type if name in PARAMETERS else None
    if not text.strip() or text.strip() in ("''", '""') or (name == "data.train_files" and text.strip() == "[]"):
        raise UserError(
            f"command line: {item!r} gives {name} no value (a variable of the shell that is not set?). Give one, leave "
            f"the argument out, or write {key}=null for what is not set."
        )
    if typing.get_origin(kind) is list and re.search(r"[\[,]\s*(,|\]$)", text.strip()) and text != "[]":
        raise UserError(
            f"command line: {item!r}: an entry of the list is empty (a variable of the shell that is not set?)."
        )
    if text == "null":
        return key, None
    if kind in (str, str | None) and not inside:
        return key, text
    try:
        return key, parse_yaml(text)
    except TwiceError as e:
        raise UserError(f"command line: {key}={text}: {e}.") from e
    except (yaml.YAMLError, ValueError, RecursionError):
        return key, text


def _refuse_spaces(overrides: list[str]) -> None:
    """Raise UserError where a setting was cut by spaces before or after its `=`."""
    for i, item in enumerate(overrides):
        if item.startswith("="):
            parts = overrides[max(i - 1, 0) : i + 1 + (item == "=")]
            raise UserError(f"command line: {' '.join(parts)}: a setting has no spaces; write {quote(''.join(parts))}.")


def keys_of(settings: list[str]) -> set[str]:
    """Return the parameters that texts `section.name=value` set, by our names. Raise UserError."""
    found: set[str] = set()
    for item in settings:
        typed, value = _typed(item)
        set_here = ours(typed, value, "command line", Foreign())
        found |= {find_parameter(key, "command line")[0] for key, _ in set_here} or {typed}
    return found


def load_config(
    path: str | Path | None = None,
    overrides: list[str] | tuple[str, ...] = (),
    note: Callable[[str], None] = lambda text: None,
) -> Config:
    """Return the defaults, overwritten by the YAML file, overwritten by `section.name=value` texts. Raise UserError.

    `note` is called with a line about each setting of verl or TRL that changes nothing here, and about each parameter
    that the command line gives twice.
    """
    config, places, foreign = Config(), {}, Foreign()
    _refuse_spaces(list(overrides))
    path = None if path is None else find_config(path)
    leaves = _leaves(read_file(path)) if path else []
    typed = [(item.partition("=")[0], "command line") for item in overrides if "=" in item]
    require_known([*((name, str(path)) for name, _ in leaves), *typed])
    if path:
        places = _set_from_file(config, leaves, path, foreign)
        config.trainer.run_name = config.trainer.run_name or path.stem
    for item in overrides:
        for setting in ours(*_typed(item), "command line", foreign):
            _set_from_command_line(config, *setting, places, foreign.notes)
    set_later(config, foreign.later)
    for text in foreign.notes:
        note(text)
    apply_form(config, places)
    name = config.trainer.run_name = config.trainer.run_name or "run"
    check_path(name, "trainer.run_name", written=True)
    if Path(name).name != name or name in ("checkpoints", ".."):
        raise UserError(f"trainer.run_name = {name!r} must be a plain folder name, and not 'checkpoints'.")
    return config

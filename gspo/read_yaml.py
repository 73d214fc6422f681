"""Read YAML and JSON without losing anything: a key given twice is an error, and a text stays as it was written.

YAML 1.1 reads `2026-11-29` as a date, `1.10` as 1.1, `007` as 7 and `on` as true. So numbers and truth values come as
`Written`, and a parameter that is a text takes their characters. Dates are texts.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import yaml


class TwiceError(ValueError):
    """A key is given twice in one mapping: one of its two values would be lost."""


@dataclass(frozen=True)
class Written:
    """A number or a truth value, and the characters that it was written with."""

    value: Any
    text: str


class _Loader(yaml.SafeLoader):
    """The safe loader, with `Written` values, text keys and no key twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":null"):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a text", key.start_mark)
            line = key.start_mark.line + 1
            if key.value in lines and key.value != "<<":
                raise TwiceError(f"key {key.value!r} is given twice, on lines {lines[key.value]} and {line}")
            lines[key.value] = line
        built = super().construct_mapping(node, deep)
        return {key.text if isinstance(key, Written) else key: value for key, value in built.items()}


def _keep_text(kind: str) -> None:
    """Have values of this YAML type constructed as `Written`."""
    construct = yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{kind}"]
    _Loader.add_constructor(
        f"tag:yaml.org,2002:{kind}", lambda loader, node: Written(construct(loader, node), node.value)
    )


for _kind in ("int", "float", "bool"):
    _keep_text(_kind)
# YAML 1.1 takes 1e-4, without a point, for a text.
_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """Parse YAML. Raise TwiceError, yaml.YAMLError, or ValueError for a number that is none."""
    return yaml.load(text, _Loader)


def parse_json(text: str) -> Any:
    """Parse JSON. Raise TwiceError, or ValueError where it is none."""
    return json.loads(
        text,
        object_pairs_hook=without_repeats,
        parse_int=lambda x: Written(int(x), x),
        parse_float=lambda x: Written(float(x), x),
    )


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict. Raise TwiceError where a key is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise TwiceError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice in one object")
    return found


def plain(value: Any) -> Any:
    """Return what was parsed with every `Written` replaced by its value."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Written) else value

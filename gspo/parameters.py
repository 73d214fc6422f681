"""Print docs/parameters.md from the parameters themselves: `python -m gspo.parameters > docs/parameters.md`."""

import dataclasses
import typing
from typing import Any, Literal

from gspo.config import Config, flatten, parameters, to_dict
from gspo.config_aliases import ALIASES
from gspo.system.program import guarded


def _allowed(f: dataclasses.Field) -> str:
    """Return a parameter's range and its named choices; empty where every value of its type will do."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = ", ".join(f"{sign} {f.metadata[name]:g}" for name, sign in signs.items() if name in f.metadata)
    kinds = [f.type, *typing.get_args(f.type)]
    literal = next((kind for kind in kinds if typing.get_origin(kind) is Literal), None)
    return " / ".join([*filter(None, [limits]), *(f"`{choice}`" for choice in typing.get_args(literal))])


def _default(value: Any) -> str:
    """Return a default as a user would type it; empty where nothing is set."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "" if value in (None, [], {}) else f"`{value}`"


def parameters_page() -> str:
    """Return docs/parameters.md: each section with a table of its parameters, then the other names."""
    lines = [
        "# Parameters",
        "",
        "[中文](zh/parameters.md) · code: [gspo/config.py](../gspo/config.py), and "
        "[gspo/parameters.py](../gspo/parameters.py), which prints this page: "
        "`python -m gspo.parameters > docs/parameters.md`",
        "",
        "Set a parameter in the YAML file, or on the command line as `section.name=value`, which wins over the file. "
        "What neither names keeps its default. An unknown name or a value out of range is an error. An empty default "
        "means: not set.",
    ]
    defaults = flatten(to_dict(Config()))
    for section in dataclasses.fields(Config):
        lines += ["", f"## {section.name}", "", section.type.__doc__, ""]
        lines += ["| parameter | default | allowed | meaning |", "|---|---|---|---|"]
        for key, f in parameters(section.type, f"{section.name}.").items():
            meaning = f.metadata["help"].replace("|", "\\|")
            lines.append(f"| `{key}` | {_default(defaults[key])} | {_allowed(f)} | {meaning} |")
    lines += ["", "## Other names", "", "These names, those of verl and TRL among them, are accepted as well.", ""]
    lines += ["| name | parameter |", "|---|---|", *(f"| `{name}` | `{key}` |" for name, key in ALIASES.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    guarded(lambda: print(parameters_page(), end=""))

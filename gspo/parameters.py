"""Print docs/parameters.md from the parameters themselves: `python -m gspo.parameters > docs/parameters.md`.

With `--foreign`: docs/coming-from-verl-or-trl.md, the settings of verl and TRL.
"""

import argparse
import dataclasses
import typing
from typing import Any, Literal

from gspo.command_line import parse_arguments
from gspo.config import Config, flatten, parameters, to_dict
from gspo.config_aliases import ALIASES
from gspo.foreign_not_needed import NOT_NEEDED, NOT_NEEDED_SECTIONS
from gspo.foreign_settings import ANSWERS, LATER_WORDS, WORDS
from gspo.system.help_text import HelpText
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


def foreign_rows() -> list[tuple[str, str]]:
    """Return every setting of verl and TRL that is known, with what it comes to here."""
    names = list(ALIASES)
    theirs = [*names[names.index("actor_rollout_ref.model.path") :], "learning_rate", "output_dir", "run_name"]
    rows = [(name, f"`{ALIASES[name]}`") for name in theirs]  # what stands before is the original description's
    rows += WORDS.items()
    rows += LATER_WORDS.items()
    sections = {f"{section}*": why for section, why in NOT_NEEDED_SECTIONS.items()}
    rows += ((name, f"needs no setting: {why}") for name, why in (NOT_NEEDED | sections).items())
    rows += ((name, f"an error, where it is on: {answer}") for name, answer in ANSWERS.items())
    return sorted(rows, key=lambda row: ("." not in row[0], row[0]))


# what their scripts do not say, as it is their default -> what it is here -> the setting that makes it theirs
OTHER_DEFAULTS = (
    ("TRL's GRPOTrainer trains GRPO", "GSPO, unless an algorithm is named", "`objective.algorithm=grpo`"),
    ("responses are sampled at temperature 1", "0.9", "`rollout.temperature=1`"),
    ("the ratio is clipped at 0.2 on both sides", "0.2 and 0.28", "`objective.clip_high=0.2`"),
    ("the KL term's reference is the initial model", "each round's first policy", "`reference.refresh=never`"),
    ("TRL: no KL term; the learning rate falls", "0.001; constant", "`objective.kl_coef=0`, `optim.schedule=linear`"),
    ("verl rewards GSM8K's rows with 1 or 0", "also 0.1 and 0.5 ([reward.md](reward.md))", "your own `reward.path`"),
    ("verl validates with one greedy answer", "`eval.n` sampled answers, and a greedy one", "the row `greedy`"),
)


def foreign_page() -> str:
    """Return docs/coming-from-verl-or-trl.md: where defaults differ, a table of verl's settings and one of TRL's."""
    lines = [
        "# Coming from verl or TRL",
        "",
        "[中文](zh/coming-from-verl-or-trl.md) · code: [gspo/foreign_settings.py](../gspo/foreign_settings.py), "
        "[gspo/config_aliases.py](../gspo/config_aliases.py); this page: "
        "`python -m gspo.parameters --foreign > docs/coming-from-verl-or-trl.md`",
        "",
        "Settings of verl and TRL can be given as they are, on the command line or in a file. What needs no setting "
        "here is said in a line and passed over; what has no counterpart is an error with what to do instead. Rows and "
        "reward functions: [data.md](data.md#rows), [reward.md](reward.md#your-own-function). To evaluate a model "
        "without training (verl's `trainer.val_only`): `python eval.py MODEL --data FILE`.",
        "",
        "## What a script does not say",
        "",
        "A script sets what differs from its trainer's defaults. The defaults here differ in this:",
        "",
        "| verl and TRL | here | to have theirs |",
        "|---|---|---|",
        *(f"| {theirs} | {here} | {setting} |" for theirs, here, setting in OTHER_DEFAULTS),
    ]
    for title, dotted in (("verl", True), ("TRL", False)):
        lines += ["", f"## {title}", "", "| setting | here |", "|---|---|"]
        lines += [f"| `{name}` | {here} |" for name, here in foreign_rows() if ("." in name) == dotted]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gspo.parameters", description=__doc__, formatter_class=HelpText)
    parser.add_argument("--foreign", action="store_true", help="the settings of verl and TRL, and what they come to")
    print(foreign_page() if parse_arguments(parser).foreign else parameters_page(), end="")


if __name__ == "__main__":
    guarded(main)

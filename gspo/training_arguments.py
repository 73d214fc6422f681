"""Read train.py's command line. Nothing here imports torch, so that a mistake in it is said before torch is loaded."""

import argparse

from gspo.command_line import EVERY, parse_arguments
from gspo.read_config import STANDARD, load_config
from gspo.system.help_text import HelpText
from gspo.system.output import kept_output
from gspo.system.program import mistakes_said


def training_arguments(description: str | None) -> argparse.Namespace:
    """Return `config`, `check` and `overrides` of train.py's command line; `--help` shows the description."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpText)
    parser.add_argument(
        "--config", default=STANDARD, help="YAML file, or a preset's name: quick, seed (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="read configuration, data and reward function, then stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="see python -m gspo.parameters")
    return parse_arguments(parser, parameters=EVERY)


def check_command_line(description: str | None) -> None:
    """End the program with one paragraph where its command line or its configuration is wrong, as it would later."""
    with kept_output(), mistakes_said():
        args = training_arguments(description)
        load_config(args.config, args.overrides)

"""Take `section.key=value` beside the flags of a program that reads only some settings: eval.py and gspo.sample."""

import argparse
import re
import sys
from pathlib import Path

from gspo.command_line import parse_arguments
from gspo.config import known_keys
from gspo.errors import UserError
from gspo.foreign_settings import is_foreign
from gspo.read_config import keys_of, require_known

SAMPLING = (
    r"rollout\.(temperature|top_p|top_k|min_p|max_new_tokens|stop|skip_special_tokens|engine|max_slots|kv_memory_gib)"
)
SAMPLED_WITH = ("temperature", "top_p", "top_k")
DOTTED = re.compile(r"\+*[A-Za-z_]\w*(\.\w+)+=")
INSTEAD = {
    "rollout.n": "the number of responses is eval.n (--n)",
    "model.path": "the model is the first argument",
    "data.train_files": "the prompts are data.test_files (--data)",
    "data.val_files": "the prompts are data.test_files (--data)",
    **{f"actor_rollout_ref.rollout.val_kwargs.{name}": f"it samples with rollout.{name}" for name in SAMPLED_WITH},
    "actor_rollout_ref.rollout.val_kwargs.do_sample": "greedy answers are always counted too, beside sampled ones",
}


def parse_with_settings(parser: argparse.ArgumentParser, read: re.Pattern[str], purpose: str) -> argparse.Namespace:
    """Parse the command line -> the flags, and in `settings` the texts `section.key=value`.

    UserError for a setting that is unknown, or that is not among those that are `read` for this purpose.
    """
    given = sys.argv[1:]
    settings = [text for before, text in zip(["", *given], given, strict=False) if _is_setting(text, before)]
    args = parse_arguments(parser, [text for text in given if text not in settings], read)
    require_known([(text.partition("=")[0], "command line") for text in settings])
    for text in settings:
        for key in keys_of([text]):
            if not read.fullmatch(key):
                cure = INSTEAD.get(key, "leave it out")
                raise UserError(f"command line: {text}: {key} has no effect on {purpose}; {cure}.")
    args.settings = settings
    return args


def _is_setting(text: str, before: str) -> bool:
    """Return whether an argument is a setting, and neither a file nor the value of the flag before it."""
    key, equals, _ = text.partition("=")
    known = bool(equals) and (key.lstrip("+") in known_keys() or is_foreign(key))
    if known or (DOTTED.match(text) and not before.startswith("--")):
        return not Path(text).exists()
    return False

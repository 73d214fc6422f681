"""Read a model's generation_config.json, and keep of it what transformers can save again."""

import json
from functools import cache
from types import SimpleNamespace
from typing import Any

from transformers import GenerationConfig

from gspo.errors import UserError
from gspo.models.model_folder import read_json
from gspo.system.console import say

FILE = "generation_config.json"
NOT_SETTINGS = ("transformers_version", "_from_model_config")


def read_generation_config(path: str) -> GenerationConfig | None:
    """Return a model's generation config, without the settings that transformers refuses; None where it has none.

    What is left out is said once. It changes no training: of this file only the end tokens are used here, and the rest
    is for those who will use the checkpoints. UserError where the file is damaged.
    """
    settings = read_json(path, FILE)
    if settings is None:
        return None
    kept, dropped = valid_settings(settings)
    end_ids_of(SimpleNamespace(**settings), FILE)
    if dropped:
        _say_dropped(path, "; ".join(f"{name} = {settings[name]!r} ({why})" for name, why in dropped.items()))
    return _config(kept)


def valid_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Split settings into those that are valid together, and those that are not, each with transformers' reason.

    They are tried one by one, again as long as another one fits: num_return_sequences is valid beside do_sample.
    """
    if _refused(settings) is None:
        return settings, {}
    waiting = {name: x for name, x in settings.items() if name not in NOT_SETTINGS}
    kept: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    while True:
        before = len(kept)
        for name in [name for name in waiting if name not in kept]:
            why = _refused({**kept, name: waiting[name]})
            if why is None:
                kept[name] = waiting[name]
            else:
                reasons[name] = why
        if len(kept) == before:
            return kept, {name: reasons[name] for name in waiting if name not in kept}


def _refused(settings: dict[str, Any]) -> str | None:
    """Return why transformers refuses these settings together, or None."""
    try:
        config = _config(settings)
        config.validate()
        json.loads(config.to_json_string())
    except Exception as e:  # wrong types are compared, and raise kinds of their own
        return " ".join(str(e).split())[:160].rstrip(".")
    return None


def _config(settings: dict[str, Any]) -> GenerationConfig:
    """Return them as a GenerationConfig that can be saved as a published one: with warnings, not with errors."""
    config = GenerationConfig.from_dict(settings)
    config._original_object_hash = hash(config)
    return config


@cache
def _say_dropped(path: str, what: str) -> None:
    say(f"note: {path}/{FILE}: left out of checkpoints, as transformers refuses it: {what}.")


def end_ids_of(source: Any, place: str, vocab_size: int | None = None) -> set[int]:
    """Return the end tokens that a config or a tokenizer names. UserError where they are no token ids of the model."""
    value = getattr(source, "eos_token_id", None)
    ids = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    if wrong := [x for x in ids if isinstance(x, bool) or not isinstance(x, int)]:
        raise UserError(f"eos_token_id = {value!r} in the model's {place}: {wrong[0]!r} is no whole number.")
    if vocab_size is not None and (beyond := [x for x in ids if x >= vocab_size]):
        raise UserError(
            f"eos_token_id = {value!r} in the model's {place}: the vocabulary has {vocab_size} tokens, so {beyond[0]} "
            "is never sampled and ends no response. Copy that file of the model that these weights come from."
        )
    return {x for x in ids if x >= 0}  # some write -1 for none

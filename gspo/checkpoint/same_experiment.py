"""Know whether a run that goes on is the one that its folder holds, and which of its settings have changed since."""

import os
import re
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from gspo import config as configuration
from gspo.checkpoint import fingerprints
from gspo.checkpoint.fingerprints import Fingerprints
from gspo.config import Config
from gspo.errors import UserError
from gspo.system.console import say
from gspo.system.files import write_text

# Settings that a resumed run may change. To change any other is to start another experiment. The text of the reward
# function is kept, and compared by `save_reward_function`, whatever its file is called.
FREE_TO_CHANGE = re.compile(
    r"trainer\.(max_steps|total_epochs|save_freq|keep_last|keep_best|async_save|resume|sample_rows|output_dir|run_name)$"
    r"|trainer\.(n_gpus|nnodes|trackers|project_name|stop_when|time_limit)$|health\.|eval\.|data\.test_files$|reference\.param_offload$"
    r"|rollout\.(engine|max_slots|kv_memory_gib|tensor_model_parallel_size|weights)$"
    r"|optim\.(micro_batch_|gradient_reduction$|offload$)"
    r"|model\.(gradient_checkpointing|shard_size|reshard_after_forward)$"
    r"|reward\.(path|workers|timeout_s|memory_gib|concurrency|check_rows)$"
)
# Compared by content, where fingerprints are kept.
CONTENT = ("model.path", "data.chat_template", "data.train_files", "data.val_files")
# Step sizes and coefficients: `trainer.resume=force` may change them as well.
FORCED = re.compile(
    r"(optim|critic)\.(learning_rate|schedule|min_lr_ratio|warmup_steps|weight_decay|beta1|beta2|grad_clip)$"
    r"|optim\.(epochs_per_rollout|minibatches)$|critic\.(clip|gamma|gae_lambda|normalize_advantages)$"
    r"|objective\.(preference_beta|margin|label_smoothing|simpo_gamma|use_ranking_loss|ranking_coef|kl_coef|nll_coef)$"
    r"|objective\.(clip_low|clip_high|max_mismatch_weight)$"
)
HISTORY = "config_history.yaml"  # beside config.yaml: which settings have changed, and after which step
NOT_HISTORY = re.compile(r"trainer\.(resume|output_dir|run_name|n_gpus|nnodes)$")  # no settings of how it trains

Changed = dict[str, tuple[Any, Any]]  # setting -> its value in the folder's config.yaml, and now


def changed_settings(folder: Path, cfg: Config) -> Changed:
    """Return the settings in which a configuration differs from a run's config.yaml. UserError where that is lost."""
    stored = folder / "config.yaml"
    try:
        before = configuration.flatten(yaml.safe_load(stored.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError, AttributeError) as e:
        raise UserError(
            f"{stored} cannot be read ({' '.join(str(e).split())}), so it is not known what run this folder holds. Put "
            "it back, or start anew with trainer.resume=never, which renames the folder."
        ) from e
    now = configuration.flatten(configuration.to_dict(cfg))
    before = configuration.flatten(configuration.to_dict(Config())) | before  # the file may end before its end
    return {key: (before[key], now[key]) for key in now if before[key] != now[key]}


def check_same_experiment(folder: Path, newest: Path, cfg: Config, prints: Fingerprints) -> None:
    """Raise UserError, which names all of them, where settings have changed that a run which goes on must keep.

    Names of the model and of data files may be written in another way; without fingerprints, of the same place.
    `newest` is the checkpoint from which another run could begin.
    """
    kept, force = fingerprints.read(folder), cfg.trainer.resume == "force"
    changed = {key: both for key, both in changed_settings(folder, cfg).items() if not FREE_TO_CHANGE.match(key)}
    for key in CONTENT:
        if key in changed and (_comparable(key, kept, prints) or _same(*changed[key])):
            del changed[key]
    refused = {key: both for key, both in changed.items() if not (force and FORCED.match(key))}
    if not refused:
        return
    differences = "; ".join(
        f"{key} = {before!r}, but this command has {now!r}" for key, (before, now) in refused.items()
    )
    cures = [f"begin another run from its checkpoint: {quote(f'trainer.resume={newest}')} trainer.run_name=NEW"]
    if all(FORCED.match(key) for key in refused):
        cures.append("go on in this folder with other step sizes and coefficients: trainer.resume=force")
    cures.append("start anew: trainer.resume=never, which renames the old folder, or another trainer.run_name")
    raise UserError(f"{folder} holds a run with {differences}. Keep them; or {'; or '.join(cures)}.")


def keep_history(folder: Path, step: int, cfg: Config) -> None:
    """Append the settings that change in a run that goes on after `step` to its history, and say what `force` changes.

    To be called before config.yaml is written anew. OSError where the history cannot be written.
    """
    changed = {key: both for key, both in changed_settings(folder, cfg).items() if not NOT_HISTORY.match(key)}
    if not changed:
        return
    file = folder / HISTORY
    entry = {"after_step": step, "changed": {key: {"from": old, "to": new} for key, (old, new) in changed.items()}}
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    write_text(file, before + yaml.safe_dump([entry], sort_keys=False, allow_unicode=True))
    forced = [f"{key} = {new!r} (was {old!r})" for key, (old, new) in changed.items() if FORCED.match(key)]
    if forced:
        say(f"from step {step + 1} on: {', '.join(forced)}; {file} keeps what held before")


def _same(before: list[str] | str | None, now: list[str] | str | None) -> bool:
    """Return whether two names, or two lists of them, are of the same files."""
    absolute = [
        [os.path.abspath(name) for name in ([names] if isinstance(names, str) else names or [])]
        for names in (before, now)
    ]
    return absolute[0] == absolute[1]


def _comparable(key: str, kept: Fingerprints, prints: Fingerprints) -> bool:
    """Return whether both fingerprints are known, and are of as many held-out rows (eval.round_prompts may change)."""
    both = bool(kept.get(key) and prints.get(key))
    return both and (key != "data.val_files" or kept[key].split()[0] == prints[key].split()[0])


def check_same_content(folder: Path, cfg: Config, prints: Fingerprints, newest: Path) -> None:
    """Raise UserError, which names the ways to go on, if model, chat template or rows are not those that the run began
    with."""
    kept, now = fingerprints.read(folder), configuration.flatten(configuration.to_dict(cfg))
    for key in CONTENT:
        if not _comparable(key, kept, prints) or kept[key] == prints[key]:
            continue
        anew = "trainer.resume=never renames the folder and starts anew"
        if key == "model.path":
            raise UserError(
                f"model.path = {now[key]!r} does not hold the model that the run in {folder} began with. Give that "
                f"model, or this run another trainer.run_name; {anew}."
            )
        if key == "data.chat_template":
            raise _other_template(folder, cfg, newest, anew)
        rows = [text[key].split()[0] for text in (kept, prints)]
        start = quote(f"trainer.resume={newest}" if rows[0] == rows[1] else f"model.path={newest}")
        if cfg.model.lora and rows[0] != rows[1]:
            start = f"model.path=FOLDER, exported by python -m gspo.export {quote(str(newest))} FOLDER,"
        raise UserError(
            f"{key} = {now[key]!r} does not hold the rows that the run in {folder} began with ({rows[0]} rows then, "
            f"{rows[1]} now). Give those rows; or go on with these in a run of another name: {start} "
            f"trainer.run_name=OTHER; {anew}."
        )


def _other_template(folder: Path, cfg: Config, newest: Path, anew: str) -> UserError:
    """Return the error of a chat template whose text has changed since the run began; `anew` says how to start anew."""
    file, start = cfg.data.chat_template, quote(f"trainer.resume={newest}")
    place = f"data.chat_template = {file!r}" if file else f"data.chat_template = None, model.path = {cfg.model.path!r}"
    return UserError(
        f"{place}: the chat template has another text than when the run in {folder} began. Put that text back; or go "
        f"on with this one in a run of another name: {start} trainer.run_name=OTHER; {anew}."
    )

"""Runs on disk: whether a folder may be trained in, what a run goes on from, what is kept beside its checkpoints."""

import contextlib
import errno
import fcntl
import json
import os
import re
import time
from pathlib import Path

import yaml

from gspo import config as configuration
from gspo.checkpoint import manifest
from gspo.config import Config
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.models.loading import architecture, resolve_path
from gspo.system.console import say
from gspo.system.files import PART, point_link, remove, write_text
from gspo.system.torchrun import restart_count

# What a resumed run may change; everything else would make it another experiment.
FREE_TO_CHANGE = re.compile(
    r"trainer\.(max_steps|total_epochs|save_freq|keep_last|keep_best|async_save|resume|sample_rows|output_dir|run_name)$"
    r"|trainer\.(n_gpus|nnodes)$|health\.|eval\.|data\.test_files$|reference\.param_offload$"
    r"|rollout\.(engine|max_slots|kv_memory_gib|tensor_model_parallel_size|weights)$"
    r"|optim\.(micro_batch_|gradient_reduction$|offload$)"
    r"|model\.(gradient_checkpointing|shard_size|reshard_after_forward)$"
    r"|reward\.(workers|timeout_s|memory_gib|concurrency|check_rows)$"
)
DAMAGED = ".damaged"
PATIENCE_S = 20.0  # for a process that was killed to be gone
_held: dict[Path, int] = {}


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below a `checkpoints` folder, oldest first."""
    found = (p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name))
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint below a `checkpoints` folder. Not verified: who resumes or exports it does that."""
    return next((p for p in reversed(list_checkpoints(folder)) if (p / "trainer" / "state.json").exists()), None)


def open_run(cfg: Config, world: World) -> tuple[Path, Path | None]:
    """-> (run folder, checkpoint to resume from or None), with the resolved config written. Every rank calls it.

    UserError when the folder holds another experiment, is in use, or has damaged checkpoints only. `resume=never` sets
    an old run aside; nothing is deleted.
    """
    folder = Path(cfg.trainer.output_dir) / cfg.trainer.run_name
    candidates, named = world.broadcast_from_main(lambda: _candidates(folder, cfg))
    checkpoint = _newest_whole(candidates, named, world)
    world.broadcast_from_main(lambda: _prepare(folder, checkpoint, cfg))
    blind = [rank for rank, sees in enumerate(world.gather((folder / "config.yaml").exists())) if not sees]
    if blind:
        raise UserError(f"trainer.output_dir: {folder} is not there on rank {blind[0]}; give a folder all nodes share.")
    return folder, checkpoint


def _candidates(folder: Path, cfg: Config) -> tuple[list[Path], bool]:
    """-> (checkpoints that the run might go on from, the best first; whether the user named one)."""
    if folder.exists():
        _hold(folder)  # before looking: whoever held it may have gone on until now
    own, resume = list_checkpoints(folder / "checkpoints"), cfg.trainer.resume
    if resume == "never" and restart_count():
        resume = "auto"  # the command was given once, and this is its run
    if own and resume not in ("auto", "never"):
        if Path(resume).resolve().parent == own[-1].resolve().parent and Path(resume).resolve() != own[-1].resolve():
            raise UserError(
                f"trainer.resume = {resume!r}: this run has gone on to {own[-1].name} since. Give the run that begins "
                "there another trainer.run_name."
            )
        resume = "auto"  # the same command again: it has begun there, and goes on where it stopped
    if resume == "never" and folder.exists():
        _set_aside(folder)
    if resume == "auto" and own:
        _check_same_experiment(folder / "config.yaml", cfg)
        return own[::-1], False
    if resume == "auto" and (damaged := sorted((folder / "checkpoints").glob(f"step_*{DAMAGED}"))):
        raise UserError(
            f"{folder} has no checkpoint but damaged ones ({damaged[-1].name}). Start anew with trainer.resume=never, "
            "which sets it aside, or another trainer.run_name."
        )
    if resume in ("auto", "never"):
        return [], False
    if not (Path(resume) / "trainer" / "state.json").exists():
        found = latest_checkpoint(Path(resume)) or latest_checkpoint(Path(resume) / "checkpoints")
        raise UserError(
            f"trainer.resume = {resume!r} is not a checkpoint folder (no trainer/state.json in it)."
            f"{f' Do you mean {found}?' if found else ''}"
        )
    return [Path(resume)], True


def _newest_whole(candidates: list[Path], named: bool, world: World) -> Path | None:
    """The first candidate that is as it was written; what is not is told of, and set aside unless the user named it."""
    wrong = ""
    for checkpoint in candidates:
        said = manifest.find_damage(checkpoint, world, required=not named)
        if not said:
            return checkpoint
        wrong = f"{checkpoint} is damaged: {said}"
        if named:
            raise UserError(f"trainer.resume = {str(checkpoint)!r} is damaged: {said}. Give another checkpoint.")
        world.broadcast_from_main(lambda old=checkpoint: _put_away(old))
        say(f"warning: {wrong}; it is kept as {checkpoint.name}{DAMAGED}, and the one before it is used.")
    if wrong:
        raise UserError(f"{wrong}, and none before it is whole. Start anew with trainer.resume=never.")
    return None


def _put_away(checkpoint: Path) -> None:
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    try:
        remove(aside)
        checkpoint.rename(aside)
    except OSError as e:
        raise UserError(f"{checkpoint} is damaged and cannot be renamed: {e.strerror or e}.") from e


def _prepare(folder: Path, checkpoint: Path | None, cfg: Config) -> None:
    if checkpoint is not None:
        _check_same_model(checkpoint, cfg)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        _hold(folder)
        for leftover in [*folder.glob(f"*{PART}"), *(folder / "checkpoints").glob(f"*{PART}")]:
            remove(leftover)
        if checkpoint is None and (folder / "tensorboard").exists():  # an earlier attempt that reached no checkpoint
            remove(folder / "tensorboard")
        write_text(folder / "config.yaml", configuration.dump(cfg))
        _link_latest_run(folder)
    except OSError as e:
        raise UserError(f"trainer.output_dir: cannot write {folder}: {e.strerror or e}.") from e


def _hold(folder: Path) -> None:
    """Two processes that write one run would ruin it: the folder is locked as long as this one lives."""
    if folder in _held:
        os.close(_held.pop(folder))
    handle, until = os.open(folder, os.O_RDONLY), time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(handle)
                raise UserError(
                    f"{folder} is being trained in by another process. Wait for it, or give this run another "
                    "trainer.run_name."
                ) from None
            time.sleep(0.1)
        except OSError as e:  # file systems that lock no folders
            if e.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
            break
    _held[folder] = handle


def _set_aside(folder: Path) -> None:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(folder.stat().st_mtime))
    aside = folder.with_name(f"{folder.name}-{stamp}")
    while aside.exists():
        aside = aside.with_name(aside.name + "x")
    folder.rename(aside)
    say(f"set the earlier run aside as {aside}")


def save_reward_function(folder: Path, source: str, step: int) -> None:
    """A copy of the reward function beside the run; one that has changed since is told of, and both are kept.

    For the main process; OSError when they cannot be written.
    """
    kept = folder / "reward_func.py"
    if kept.exists() and step and (before := kept.read_text(encoding="utf-8")) != source:
        older = folder / f"reward_func_until_step_{step}.py"
        write_text(older, before)
        say(
            f"warning: the reward function is another one than this run began with (kept as {older}). From step {step} "
            "on it scores by the new one; trainer.resume=never starts anew."
        )
    write_text(kept, source)


def _check_same_experiment(stored: Path, cfg: Config) -> None:
    try:
        before = configuration.flatten(yaml.safe_load(stored.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError, AttributeError) as e:
        raise UserError(
            f"{stored} cannot be read ({' '.join(str(e).split())}), which says what run this is. Put it back, or set "
            "the run aside with trainer.resume=never."
        ) from e
    now = configuration.flatten(configuration.to_dict(cfg))
    changed = [k for k in now if k in before and before[k] != now[k] and not FREE_TO_CHANGE.match(k)]
    if changed:
        k = changed[0]
        raise UserError(
            f"{stored.parent} holds a run with {k} = {before[k]!r}; this command has {now[k]!r}"
            f"{f' (and {len(changed) - 1} more differences)' if len(changed) > 1 else ''}. "
            "Give it another trainer.run_name, or trainer.resume=never to set the old run aside and start anew."
        )


def _check_same_model(checkpoint: Path, cfg: Config) -> None:
    mine, theirs = architecture(resolve_path(cfg.model.path)), architecture(str(checkpoint))
    wrong = [k for k in mine if mine[k] != theirs[k]]
    if wrong:
        k = wrong[0]
        raise UserError(
            f"{checkpoint} is a checkpoint of another model: {k} is {theirs[k]!r} there and {mine[k]!r} in "
            f"model.path = {resolve_path(cfg.model.path)!r}."
        )


def _link_latest_run(folder: Path) -> None:
    """`outputs/checkpoints` -> this run's, where the seed says that models are."""
    link = folder.parent / "checkpoints"
    if link.exists() and not link.is_symlink():
        say(f"{link} is not a link, so it is left alone; this run's checkpoints are in {folder / 'checkpoints'}")
        return
    point_link(link, Path(folder.name) / "checkpoints")


def needs_evaluation(folder: Path, name: str, step: int, world: World) -> bool:
    """Whether the evaluation `name` has yet to be made for this step."""

    def missing() -> bool:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((folder / f"{name}.json").read_text(encoding="utf-8")).get("step") != step
        return True

    return world.broadcast_from_main(missing)

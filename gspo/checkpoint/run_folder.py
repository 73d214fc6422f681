"""Open a run's folder: lock it, check that it holds the same experiment, find the checkpoint to resume from."""

import contextlib
import difflib
import errno
import fcntl
import os
import time
from pathlib import Path

import yaml

from gspo import config as configuration
from gspo.checkpoint import fingerprints, manifest
from gspo.checkpoint.adapter_checkpoints import check_kind
from gspo.checkpoint.evaluations import NAMES, remove_evaluations
from gspo.checkpoint.find_runs import latest_checkpoint, list_checkpoints
from gspo.checkpoint.fingerprints import Fingerprints
from gspo.checkpoint.same_experiment import HISTORY, check_same_content, check_same_experiment, keep_history
from gspo.config import Config
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.models.loading import architecture
from gspo.models.model_folder import resolve_path
from gspo.system.console import say
from gspo.system.files import PART, point_link, remove, write_text
from gspo.system.torchrun import restart_count

FILES = (
    *("config.yaml", HISTORY, "fingerprints.json", "metrics.jsonl", "samples.jsonl", "reward_func.py"),
    *(f"{name}{end}" for name in NAMES for end in (".json", "_answers.jsonl")),
)  # in the run's folder
DAMAGED = ".damaged"
LOCK_TIMEOUT_S = 20.0  # how long a process that was killed may take to release the folder
_locks: dict[Path, int] = {}  # run folder -> open file descriptor that holds its lock


def open_run(cfg: Config, world: World, prints: Fingerprints | None = None) -> tuple[Path, Path | None]:
    """Prepare the run's folder. Return (folder, checkpoint to resume from or None). All ranks call it together.

    `prints`, on rank 0: of the model and the data, so that a run is recognized however their names are written.
    The resolved config is written as config.yaml. UserError when the folder holds another experiment, is in use, or has
    only damaged checkpoints. `trainer.resume=never` renames the folder of an old run; nothing is deleted.
    """
    folder = Path(cfg.trainer.output_dir) / cfg.trainer.run_name
    candidates, named = world.broadcast_from_main(lambda: _candidates(folder, cfg, prints or {}))
    checkpoint = _first_undamaged(candidates, named, world)
    world.broadcast_from_main(lambda: _prepare(folder, checkpoint, cfg, prints or {}))
    without = [rank for rank, exists in enumerate(world.gather((folder / "config.yaml").exists())) if not exists]
    if without:
        raise UserError(
            f"trainer.output_dir: {folder} does not exist on the machine of rank {without[0]}; give a folder that all "
            "nodes share."
        )
    return folder, checkpoint


def _candidates(folder: Path, cfg: Config, prints: Fingerprints) -> tuple[list[Path], bool]:
    """Return (checkpoints to try to resume from, in this order; whether the user named one with trainer.resume)."""
    if folder.exists():
        _lock(folder)  # first: another process may have written checkpoints until it released the lock
    own, resume = list_checkpoints(folder / "checkpoints"), cfg.trainer.resume
    resume = "auto" if resume == "force" else resume  # what may differ is another matter (same_experiment.py)
    if resume == "never" and restart_count():
        resume = "auto"  # torchrun restarted the command: this folder is its own run
    _require_named(folder, own, resume)
    if own and resume not in ("auto", "never"):
        if Path(resume).resolve().parent == own[-1].resolve().parent and Path(resume).resolve() != own[-1].resolve():
            raise UserError(
                f"trainer.resume = {resume!r}: this run has gone on to {own[-1].name} since. To begin another run from "
                "that checkpoint, give it another trainer.run_name."
            )
        resume = "auto"  # the same command again: the run began there, and goes on where it stopped
    if resume == "never" and folder.exists():
        _rename_old_run(folder)
    if resume == "auto" and own:
        check_same_experiment(folder, own[-1], cfg, prints)
        check_same_content(folder, cfg, prints, own[-1])
        return own[::-1], False
    if resume == "auto" and (damaged := sorted((folder / "checkpoints").glob(f"step_*{DAMAGED}"))):
        raise UserError(
            f"{folder} has only damaged checkpoints ({damaged[-1].name}). Start anew with trainer.resume=never, which "
            "renames this folder, or with another trainer.run_name."
        )
    if not own and _has_results(folder) and not restart_count():  # its checkpoints were moved away, or never reached
        _rename_old_run(folder)
    return ([], False) if resume in ("auto", "never") else ([Path(resume)], True)


def check_run(cfg: Config, prints: Fingerprints) -> None:
    """Raise the UserErrors of `open_run` for what stands in the run's folder and in trainer.resume, and change nothing.

    Whether checkpoints are undamaged is not looked at.
    """
    folder, resume = Path(cfg.trainer.output_dir) / cfg.trainer.run_name, cfg.trainer.resume
    own = list_checkpoints(folder / "checkpoints")
    resume = "auto" if resume == "force" else resume
    _require_named(folder, own, resume)
    if own and resume != "never":
        check_same_experiment(folder, own[-1], cfg, prints)
        check_same_content(folder, cfg, prints, own[-1])


def _require_named(folder: Path, own: list[Path], resume: str) -> None:
    """Raise UserError unless trainer.resume is a word, or a checkpoint, or was one when the run in `folder` began."""
    if resume not in ("auto", "never") and not (own and (restart_count() or _began_from(folder, resume))):
        _require_checkpoint(resume)


def _began_from(folder: Path, resume: str) -> bool:
    """Return whether the run in a folder was started with this trainer.resume, whose folder may be gone since."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, AttributeError):
        stored = configuration.flatten(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        return stored.get("trainer.resume") == resume
    return False


def _require_checkpoint(resume: str) -> None:
    """Raise UserError, which names the nearest word or checkpoint, unless trainer.resume is a checkpoint's folder."""
    if (Path(resume) / "trainer" / "state.json").exists():
        return
    if not Path(resume).exists():
        near = difflib.get_close_matches(resume, ("auto", "never", "force"), n=1, cutoff=0.0)[0]
        raise UserError(
            f"trainer.resume = {resume!r} is neither auto, never nor force, and there is no such folder. Do you mean "
            f"{near}, or a checkpoint's folder?"
        )
    found = latest_checkpoint(Path(resume))
    raise UserError(
        f"trainer.resume = {resume!r} is not a checkpoint folder (no trainer/state.json in it)."
        f"{f' Do you mean {found}?' if found else ''}"
    )


def _first_undamaged(candidates: list[Path], named: bool, world: World) -> Path | None:
    """Return the first undamaged candidate. Rename damaged ones with a warning; UserError if the user named one."""
    failure = ""
    for checkpoint in candidates:
        damage = manifest.find_damage(checkpoint, world, required=not named)
        if not damage:
            return checkpoint
        failure = f"{checkpoint} is damaged: {damage}"
        if named:
            raise UserError(f"trainer.resume = {str(checkpoint)!r} is damaged: {damage}. Give another checkpoint.")
        world.broadcast_from_main(lambda old=checkpoint: _rename_damaged(old))
        say(f"warning: {failure}; it is renamed to {checkpoint.name}{DAMAGED}, and the one before it is used.")
    if failure:
        raise UserError(f"{failure}, and so is every one before it. Start anew with trainer.resume=never.")
    return None


def _rename_damaged(checkpoint: Path) -> None:
    """Rename step_000050 to step_000050.damaged, in place of an earlier one of that name."""
    renamed = checkpoint.with_name(checkpoint.name + DAMAGED)
    try:
        remove(renamed)
        checkpoint.rename(renamed)
    except OSError as e:
        raise UserError(f"{checkpoint} is damaged and cannot be renamed: {e.strerror or e}.") from e


def _prepare(folder: Path, checkpoint: Path | None, cfg: Config, prints: Fingerprints) -> None:
    """Create and lock the folder, remove unfinished files of earlier attempts, write config.yaml."""
    if checkpoint is not None:
        _check_same_model(checkpoint, cfg)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        _lock(folder)
        _check_files(folder)
        _remove_unfinished(folder)
        if checkpoint is None or checkpoint.parent != folder / "checkpoints":  # an earlier attempt may have left these
            remove(folder / "tensorboard")
            remove(folder / HISTORY)
            remove_evaluations(folder)
        else:
            keep_history(folder, int(checkpoint.name[5:]), cfg)
        write_text(folder / "config.yaml", configuration.dump(cfg))
        fingerprints.write(folder, prints)
        _link_latest_run(folder)
    except OSError as e:
        raise UserError(f"trainer.output_dir: cannot write {folder}: {e.strerror or e}.") from e


def _check_files(folder: Path) -> None:
    """Raise UserError where a folder, a pipe or a device has the name of one of the run's files."""
    for name in FILES:
        if (folder / name).exists() and not (folder / name).is_file():
            raise UserError(f"{folder / name} is a folder, a pipe or a device, not a file of a run. Move it away.")


def _lock(folder: Path) -> None:
    """Lock the folder (flock) until this process ends: two processes that write one run would ruin it.

    UserError if another process still holds the lock after LOCK_TIMEOUT_S.
    """
    if folder in _locks:
        os.close(_locks.pop(folder))
    handle, until = os.open(folder, os.O_RDONLY), time.monotonic() + LOCK_TIMEOUT_S
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
        except OSError as e:  # some file systems cannot lock folders
            if e.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
            break
    _locks[folder] = handle


def _has_results(folder: Path) -> bool:
    """Return whether a run has left curves, samples or a table in its folder."""
    kept = ("metrics.jsonl", "samples.jsonl", "eval_after.json")
    return any((folder / name).is_file() and (folder / name).stat().st_size for name in kept)


def _remove_unfinished(folder: Path) -> None:
    """Remove the unfinished files of earlier attempts."""
    for leftover in [*folder.glob(f"*{PART}"), *(folder / "checkpoints").glob(f"*{PART}")]:
        remove(leftover)


def _rename_old_run(folder: Path) -> None:
    """Append the time of its last change to the name of an old run's folder, whose unfinished files are removed."""
    _remove_unfinished(folder)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(folder.stat().st_mtime))
    renamed = folder.with_name(f"{folder.name}-{stamp}")
    while renamed.exists():
        renamed = renamed.with_name(renamed.name + "x")
    folder.rename(renamed)
    say(f"the earlier run is kept as {renamed}")


def save_reward_function(folder: Path, source: str, step: int) -> None:
    """Copy the reward function's source into the run's folder. If it has changed since, warn and keep both versions.

    Only the main process calls it. OSError when a file cannot be written.
    """
    kept = folder / "reward_func.py"
    if kept.exists() and step and (before := kept.read_text(encoding="utf-8", errors="replace")) != source:
        older = folder / f"reward_func_until_step_{step}.py"
        write_text(older, before)
        say(
            f"warning: the reward function has changed since this run began (the old one is kept as {older}). From "
            f"step {step} on the new one scores; trainer.resume=never starts a new run with it."
        )
    write_text(kept, source)


def _check_same_model(checkpoint: Path, cfg: Config) -> None:
    """Raise UserError unless the checkpoint's architecture, or its adapter, is that of model.path and model.lora."""
    if check_kind(checkpoint, cfg):
        return
    expected, found = architecture(resolve_path(cfg.model.path)), architecture(str(checkpoint))
    different = [k for k in expected if expected[k] != found[k]]
    if different:
        k = different[0]
        raise UserError(
            f"{checkpoint} is a checkpoint of another model: {k} is {found[k]!r} there and {expected[k]!r} in "
            f"model.path = {resolve_path(cfg.model.path)!r}. Give the model.path that the run began with."
        )


def _link_latest_run(folder: Path) -> None:
    """Point the link `outputs/checkpoints`, where the original description expects the model, to those of this run."""
    link = folder.parent / "checkpoints"
    if link.exists() and not link.is_symlink():
        say(f"{link} is not a link and is not replaced; this run's checkpoints are in {folder / 'checkpoints'}")
        return
    point_link(link, Path(folder.name) / "checkpoints")

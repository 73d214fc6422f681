"""Runs on disk: their folders, checkpoints that resume everything, exports that transformers opens.

`outputs/<run>/checkpoints/step_000050/` is a Hugging Face folder (the policy) with a `trainer/` folder beside the
weights: optimizer moments, the frozen models and the data order as safetensors, everything else in `state.json`. It is
written under another name and committed by one rename, so a folder called `step_*` is always whole. Nothing is pickled.
"""

import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gspo import config as configuration
from gspo.config import Config
from gspo.distributed import World, load_weights, shard_like, whole, whole_weights
from gspo.errors import UserError
from gspo.model import architecture, resolve_path, save_pretrained
from gspo.progress import say

# What a resumed run may change; everything else would make it another experiment.
FREE_TO_CHANGE = re.compile(
    r"trainer\.(max_steps|total_epochs|save_freq|keep_last|resume|sample_rows|output_dir|n_gpus|nnodes)$"
    r"|health\.|eval\.|data\.test_files$|reference\.param_offload$"
    r"|rollout\.(max_slots|kv_memory_gib|tensor_model_parallel_size|weights)$"
    r"|optim\.micro_batch_|model\.gradient_checkpointing$"
    r"|reward\.(workers|timeout_s|memory_gib|concurrency|check_rows)$"
)


@dataclass
class State:
    """Where a run stands; small, in JSON. All sampling follows from the seed and `step`."""

    step: int = 0  # rollouts done
    round: int = 0
    bad_steps: int = 0  # non-finite updates in a row
    round_rewards: list[list[float]] | None = None  # the previous self's on the held-out prompts [P, N]
    tokens_sampled: int = 0
    precision: str = ""  # what model.precision came to
    torch_rng: list[int] = field(default_factory=list)

    def count_bad(self, skipped: int, limit: int) -> None:
        """UserError when the updates of `limit` steps in a row were not finite."""
        self.bad_steps = self.bad_steps + 1 if skipped else 0
        if self.bad_steps >= limit:
            raise UserError(
                f"step {self.step}: updates were not finite in {limit} steps in a row; the weights are as they were "
                "before. Lower optim.learning_rate, or use model.precision=fp32."
            )


def open_run(cfg: Config) -> tuple[Path, Path | None]:
    """-> (run folder, checkpoint to resume from or None), with the resolved config written. For the main process.

    UserError when the folder holds another experiment. `resume=never` sets an old run aside; nothing is deleted.
    """
    folder = Path(cfg.trainer.output_dir) / cfg.trainer.run_name
    resume = cfg.trainer.resume
    if resume == "never" and folder.exists():
        aside = folder.with_name(
            f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(folder.stat().st_mtime))}"
        )
        while aside.exists():
            aside = aside.with_name(aside.name + "x")
        folder.rename(aside)
        say(f"set the earlier run aside as {aside}")
    checkpoint = None
    if resume == "auto":
        checkpoint = latest(folder / "checkpoints")
        if checkpoint is not None:
            _check_same_experiment(folder / "config.yaml", cfg)
    elif resume != "never":
        checkpoint = Path(resume)
        if not (checkpoint / "trainer" / "state.json").exists():
            raise UserError(f"trainer.resume = {resume!r} is not a checkpoint folder (no trainer/state.json in it).")
    if checkpoint is not None:
        _check_same_model(checkpoint, cfg)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for part in (folder / "checkpoints").glob("*.part"):
            shutil.rmtree(part)
        if checkpoint is None:  # an earlier attempt that never reached a checkpoint
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        (folder / "config.yaml").write_text(configuration.dump(cfg), encoding="utf-8")
    except OSError as e:
        raise UserError(f"trainer.output_dir: cannot write {folder}: {e.strerror or e}.") from e
    _link_latest_run(folder)
    return folder, checkpoint


def keep_reward_function(folder: Path, source: str, step: int) -> None:
    """A copy of the reward function beside the run; one that has changed since is told of, and both are kept."""
    kept = folder / "reward_func.py"
    if kept.exists() and step and (before := kept.read_text(encoding="utf-8")) != source:
        older = folder / f"reward_func_until_step_{step}.py"
        older.write_text(before, encoding="utf-8")
        say(
            f"warning: the reward function is another one than this run began with (kept as {older}). From step {step} "
            "on it scores by the new one; trainer.resume=never starts anew."
        )
    kept.write_text(source, encoding="utf-8")


def _check_same_experiment(stored: Path, cfg: Config) -> None:
    before = configuration.flatten(yaml.safe_load(stored.read_text(encoding="utf-8")) or {})
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
    link, fresh = folder.parent / "checkpoints", folder.parent / ".checkpoints.part"
    if link.exists() and not link.is_symlink():
        say(f"{link} is not a link, so it is left alone; this run's checkpoints are in {folder / 'checkpoints'}")
        return
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(Path(folder.name) / "checkpoints")
    fresh.replace(link)


def write_json(path: Path, value: Any) -> None:
    """Write a whole file or none."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def needs_test(folder: Path, name: str, step: int, world: World) -> bool:
    """Whether the evaluation `name` has yet to be made for this step."""

    def missing() -> bool:
        file = folder / f"{name}.json"
        return not file.exists() or json.loads(file.read_text(encoding="utf-8")).get("step") != step

    return world.from_main(missing)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint below a `checkpoints` folder."""
    steps = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return max((p for p in steps if (p / "trainer" / "state.json").exists()), default=None, key=lambda p: p.name)


def save(
    folder: Path,
    state: State,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    frozen: dict[str, nn.Module],
    order: dict[str, Tensor],
    tokenizer: Any,
    cfg: Config,
    world: World,
) -> Path:
    """Write `step_<state.step>`; every rank calls this, rank 0 writes. Overwrites nothing: an existing step is kept."""
    target = folder / f"step_{state.step:06d}"
    names = {id(p): name for name, p in policy.named_parameters()}
    weights = whole_weights(policy, world.is_main)
    moments: dict[str, Tensor] = {}
    for p, values in optimizer.state.items():
        for key, value in values.items():
            full = whole(value) if isinstance(value, Tensor) else torch.tensor(value)
            if world.is_main:
                moments[f"{names[id(p)]}:{key}"] = full.cpu().contiguous()
    others = {name: whole_weights(model, world.is_main) for name, model in frozen.items()}
    if not world.is_main or target.exists():
        return target
    part = target.with_name(target.name + ".part")
    (part / "trainer").mkdir(parents=True, exist_ok=True)
    save_pretrained(part, resolve_path(cfg.model.path), weights, tokenizer)
    save_file(moments, part / "trainer" / "optimizer.safetensors")
    save_file(order, part / "trainer" / "order.safetensors")
    for name, tensors in others.items():
        save_file(tensors, part / "trainer" / f"{name}.safetensors")
    state.torch_rng = torch.get_rng_state().tolist()
    (part / "trainer" / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
    for file in part.rglob("*"):
        if file.is_file():
            with file.open("rb") as f:
                os.fsync(f.fileno())
    part.rename(target)
    if cfg.trainer.keep_last:
        for old in sorted(folder.glob("step_*"))[: -cfg.trainer.keep_last]:
            shutil.rmtree(old)
    return target


def load_state(checkpoint: Path) -> State:
    return State(**json.loads((checkpoint / "trainer" / "state.json").read_text(encoding="utf-8")))


def load_order(checkpoint: Path) -> dict[str, Tensor]:
    """The order of training, as `Batches.state` gave it. UserError where a checkpoint has none."""
    file = checkpoint / "trainer" / "order.safetensors"
    if not file.exists():
        raise UserError(
            f"{checkpoint} has no trainer/order.safetensors: it was written by an earlier version, or damaged. "
            "Resume from another one (trainer.resume=FOLDER), or start anew (trainer.resume=never)."
        )
    return load_file(file)


def restore(
    checkpoint: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, frozen: dict[str, nn.Module], state: State
) -> None:
    """Put the optimizer's moments and the frozen models back; the policy was opened from the checkpoint itself."""
    moments = load_file(checkpoint / "trainer" / "optimizer.safetensors")
    for name, p in policy.named_parameters():
        values = {key.rpartition(":")[2]: v for key, v in moments.items() if key.rpartition(":")[0] == name}
        if values:
            optimizer.state[p] = {k: v if k == "step" else shard_like(v, p) for k, v in values.items()}
    for name, model in frozen.items():
        load_weights(model, load_file(checkpoint / "trainer" / f"{name}.safetensors"))
    if state.torch_rng:
        torch.set_rng_state(torch.tensor(state.torch_rng, dtype=torch.uint8))

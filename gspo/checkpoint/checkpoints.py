"""Write checkpoints while training goes on; restore.py reads them.

`outputs/<run>/checkpoints/step_000050/` is a Hugging Face folder (the policy; with `model.lora` its adapter, as peft
writes it) with a `trainer/` folder beside the weights: optimizer moments, frozen models and data order as safetensors,
everything else in `state.json`. Nothing is pickled.

Every rank writes one file of each set: full tensors, split among the ranks by size and gathered one at a time, so no
rank ever has the whole model. Between two steps the state is copied to CPU memory, and a thread on each rank writes it.
At the end of a later step, when all ranks have finished, rank 0 writes the manifest and renames the folder from
`step_000050.part`. So a folder called `step_*` is always complete.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gspo.checkpoint import manifest
from gspo.checkpoint.adapter_checkpoints import AdapterFolder
from gspo.checkpoint.find_runs import latest_checkpoint, list_checkpoints
from gspo.checkpoint.hf_folder import ModelFolder, index_json, shard_files
from gspo.config import Config
from gspo.distributed.adapters import Adapter
from gspo.distributed.move_weights import full_tensor
from gspo.distributed.world import World, split_by_size
from gspo.errors import UserError
from gspo.models.lora import Lora
from gspo.models.model_folder import resolve_path
from gspo.models.safetensors_files import write_bytes, write_weights
from gspo.system.console import say
from gspo.system.files import PART, point_link, remove, sync_folder

LESS = "Lower optim.learning_rate, or use model.precision=fp32"
Shards = dict[str, dict[str, Tensor]]  # file -> its tensors
Model = nn.Module | Adapter  # what is stored of it: its parameters, or those of one adapter
Trained = tuple[nn.Module, torch.optim.Optimizer]
StoredTensors = Callable[[str, Tensor], dict[str, Tensor]]  # a parameter and its name -> tensors as files have them


@dataclass
class State:
    """How far a run is: the small values that JSON holds. All sampling follows from the seed and `step`, the places of
    branches also from the last step's responses."""

    step: int = 0  # steps done
    round: int = 0  # self-play round, from 0
    planned_steps: int = 0  # steps that the run was to have when it began: they fix the length of a round; 0: not known
    total_steps: int = 0  # steps that it was to have when it was last started; 0: not known
    bad_steps: int = 0  # steps in a row with a non-finite update
    round_rewards: list[list[float]] | None = None  # [P, N] rewards on held-out prompts when the round began
    pair_metrics: dict[str, float] = field(default_factory=dict)  # on held-out pairs, as they were measured last
    tokens_sampled: int = 0
    response_length: float = 0.0  # of the last step's responses, tokens, on average; 0: none yet
    response_entropy: float = 0.0  # summed over the tokens of one, nats, on average
    precision: str = ""  # fp32 or bf16, chosen when the run began
    best_accuracy: float = -1.0  # the best so far on the held-out prompts
    best_reward: float | None = None  # ... and its mean held-out reward, which decides between equal accuracies
    best_step: int = 0
    torch_rng: list[int] = field(default_factory=list)  # bytes of torch's CPU generator

    def count_non_finite(
        self, skipped: int, limit: int, cause: str = "", saved: Callable[[], list[int]] = list
    ) -> None:
        """Count a step that skipped an update (`skipped` > 0). UserError at the `limit`-th such step in a row.

        `cause` names what was not finite first; `saved` returns the steps of the checkpoints.
        """
        self.bad_steps = self.bad_steps + 1 if skipped else 0
        if self.bad_steps < limit:
            return
        last = self.step - self.bad_steps  # the update after which nothing was finite
        text = (
            f"step {self.step}: an update was not finite in each of the last {limit} steps"
            f"{cause and f' (first: {cause})'}. Such updates were skipped, "
        )
        if last <= 0:
            raise UserError(f"{text}so the weights are those of the start. {LESS}.")
        before = max((step for step in saved() if step < last), default=0)
        begin = f"trainer.resume=.../step_{before:06d} and another trainer.run_name" if before else "the start"
        raise UserError(
            f"{text}so the weights are those of step {last}, whose update was the last: it likely spoiled them, finite "
            f"as they are. {LESS}, and go on from before it: {begin}."
        )

    def observe_responses(self, metrics: dict[str, float]) -> None:
        """Keep how long this step's responses were, and how uncertain; three digits, alike on any number of ranks."""
        length, entropy = metrics.get("response/length_mean", 0.0), metrics.get("entropy", 0.0)
        self.response_length, self.response_entropy = float(f"{length:.3g}"), float(f"{length * entropy:.3g}")

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Return whether this step has the best held-out accuracy so far, of equal ones the highest held-out reward;
        if so, keep it as the best."""
        accuracy, reward = metrics.get("heldout/accuracy", -1.0), metrics.get("heldout/reward_mean")
        tied = accuracy == self.best_accuracy and reward is not None and self.best_reward is not None
        if not (accuracy > self.best_accuracy or (tied and reward > self.best_reward)):
            return False
        self.best_accuracy, self.best_reward, self.best_step = accuracy, reward, self.step
        return True


class CheckpointWriter(threading.Thread):
    """A thread that writes this rank's files of one checkpoint."""

    def __init__(self, part: Path, state: State, shards: Shards, small: dict[str, bytes], error: str):
        super().__init__(name="checkpoint", daemon=True)
        self.part, self.state, self.shards, self.small = part, state, shards, small
        self.files: manifest.Files = {}
        self.error = error  # why it cannot be written, or could not

    def run(self) -> None:
        if self.error:
            return
        try:
            (self.part / "trainer").mkdir(parents=True, exist_ok=True)
            for name, tensors in self.shards.items():
                self.files[name] = write_weights(self.part / name, tensors)
            for name, data in self.small.items():
                (self.part / name).parent.mkdir(exist_ok=True)
                self.files[name] = write_bytes(self.part / name, [data])
        except Exception as e:  # whatever it is: training can go on without this checkpoint
            self.error = _describe(e)
        self.shards = {}  # free the copies


class Checkpoints:
    """Save a run, one checkpoint at a time. All ranks call every method together."""

    def __init__(self, run: Path, cfg: Config, tokenizer: Any, world: World):
        self.folder, self.cfg, self.world = run / "checkpoints", cfg.trainer, world
        source, lora = resolve_path(cfg.model.path), Lora.of(cfg.model.lora)
        self.model_folder = ModelFolder(source, tokenizer) if lora is None else AdapterFolder(source, tokenizer, lora)
        self.writing: CheckpointWriter | None = None
        self.copied = True  # whether tensors are copied, because training goes on while they are written

    def save(
        self,
        state: State,
        policy: Model,
        optimizer: torch.optim.Optimizer,
        frozen: dict[str, Model],
        small_files: dict[str, dict[str, Tensor]],
        at_once: bool = False,
        beside: dict[str, Trained] | None = None,
    ) -> None:
        """Start writing `step_<state.step>`, after the checkpoint before it is complete. One that exists is kept.

        Steps without a finite update are saved only `at_once`, at a run's end, and then no older checkpoint is removed:
        the last update before them may have spoiled the weights.

        `small_files` are further tensors that every rank has, a file of `trainer/` each; `beside` are further models
        that are trained, PPO's critic.

        With `at_once`, or without `trainer.async_save`, it is complete when this returns, and CPU tensors are not
        copied.
        """
        self.finish()
        if state.bad_steps and not at_once:
            return say(f"step {state.step} is not saved: its update was not finite.")
        target = self.folder / f"step_{state.step:06d}"
        if self.world.broadcast_from_main(target.exists):
            return
        state.torch_rng = torch.get_rng_state().tolist()
        self.copied = self.cfg.async_save and not at_once
        part = target.with_name(target.name + PART)
        shards, small = self._snapshot(policy, optimizer, frozen, beside or {})
        error = ""
        if self.world.is_main:
            small["trainer/state.json"] = json.dumps(asdict(state)).encode()
            shards |= {f"trainer/{name}.safetensors": tensors for name, tensors in small_files.items() if tensors}
            try:
                small |= self.model_folder.other_files(self.folder / f"beside{PART}", next(policy.parameters()).dtype)
            except Exception as e:  # the tokenizer raises kinds of its own
                error = _describe(e)
        self.writing = CheckpointWriter(part, replace(state), shards, small, error)
        self.writing.start()
        if not self.copied:
            self.finish()

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that are complete."""
        return [int(path.name[5:]) for path in list_checkpoints(self.folder)]

    def commit(self) -> None:
        """Complete the checkpoint that is being written, if every rank's thread has finished. Call between steps."""
        if self.writing and not any(self.world.gather(self.writing.is_alive())):
            self._complete()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and complete it."""
        if self.writing:
            self.writing.join()
            self._complete()

    def require(self, step: int) -> None:
        """Raise UserError unless the checkpoint `step_<step>` exists: for the end of a run."""
        self.finish()
        if not self.world.broadcast_from_main((self.folder / f"step_{step:06d}").exists):
            before = self.world.broadcast_from_main(lambda: latest_checkpoint(self.folder))
            raise UserError(
                f"step {step} is done, but its checkpoint could not be written (see the warning above). Free disk "
                f"space and give the same command again: it goes on from {before.name if before else 'the beginning'}."
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None or self.world.size == 1:  # after an error on one of several ranks, others may not come here
            self.finish()

    def _snapshot(
        self,
        policy: Model,
        optimizer: torch.optim.Optimizer,
        frozen: dict[str, Model],
        beside: dict[str, Trained],
    ) -> tuple[Shards, dict[str, bytes]]:
        """Copy this rank's part of the state. Return (tensors by file, index files that say which file has which)."""
        shards: Shards = {}
        small: dict[str, bytes] = {}
        stem, stored = self.model_folder.stem, self.model_folder.stored_tensors
        self._split(stem, _tensors(policy), stored, shards, small, self.model_folder.in_one_file)
        self._split("trainer/optimizer", _moments(policy, optimizer), _unchanged, shards, small)
        for name, trained in beside.items():
            self._split(f"trainer/{name}_optimizer", _moments(*trained), _unchanged, shards, small)
        for name, model in (frozen | {name: model for name, (model, _) in beside.items()}).items():
            self._split(f"trainer/{name}", dict(model.named_parameters()), _unchanged, shards, small)
        return shards, small

    def _split(
        self,
        stem: str,
        tensors: dict[str, Tensor],
        stored: StoredTensors,
        shards: Shards,
        small: dict[str, bytes],
        in_one_file: bool = False,
    ) -> None:
        """Gather tensors one by one, and keep those that this rank writes: its entry of `shards`.

        On rank 0 the index of the files, if there are several, is added to `small`.
        """
        sizes = {name: x.numel() * x.element_size() for name, x in tensors.items()}
        ranks = 1 if in_one_file else self.world.size
        names_of_rank = [names for names in split_by_size(sizes, ranks) if names] or [[]]
        files = shard_files(stem, len(names_of_rank))
        owner = {name: rank for rank, names in enumerate(names_of_rank) for name in names}
        mine: dict[str, Tensor] = {}
        for name, x in tensors.items():
            full = full_tensor(x)
            if owner[name] == self.world.rank:  # on one process it is the parameter itself, which the next step changes
                mine |= stored(name, full.to("cpu", copy=self.copied).contiguous())
        if self.world.rank < len(files):
            shards[files[self.world.rank]] = mine
        if self.world.is_main and len(files) > 1:
            file_of = {
                stored_name: Path(files[owner[name]]).name
                for name, x in tensors.items()
                for stored_name in stored(name, torch.empty(x.shape, dtype=x.dtype, device="meta"))
            }
            small[f"{stem}.safetensors.index.json"] = index_json(sum(sizes.values()), file_of)

    def _complete(self) -> None:
        """Collect what all ranks have written, and rename the folder; warn if any of them could not write."""
        done, self.writing = self.writing, None
        parts = self.world.gather((done.files, done.error))
        error = next((error for _, error in parts if error), "")
        files = {name: entry for part, _ in parts for name, entry in part.items()}
        error = self.world.broadcast_from_main(lambda: self._publish(done, files, error))
        if error:
            before = self.world.broadcast_from_main(lambda: latest_checkpoint(self.folder))
            say(
                f"warning: the checkpoint of step {done.state.step} could not be written ({error}); training goes on, "
                f"the latest checkpoint is {before.name if before else 'none yet'}."
            )
        else:
            best = ", the best" if done.state.step == done.state.best_step else ""
            say(f"checkpoint {self.folder / done.part.name.removesuffix(PART)}{best}")

    def _publish(self, done: CheckpointWriter, files: manifest.Files, error: str) -> str:
        """Write the manifest and give the folder its name, on rank 0; after an error remove it. Return the error."""
        try:
            if error:
                remove(done.part)
                return error
            manifest.write(done.part, files)
            for folder in {(done.part / name).parent for name in files} | {done.part}:
                sync_folder(folder)
            done.part.rename(done.part.with_name(done.part.name.removesuffix(PART)))
        except OSError as e:
            error = error or _describe(e)
            try:
                remove(done.part)
            except OSError as left:
                say(f"warning: the unfinished checkpoint {done.part} cannot be removed ({left.strerror})")
            return error
        try:
            sync_folder(self.folder)
            if not done.state.bad_steps:
                self._tidy(done.state)
        except OSError as e:
            say(f"warning: {self.folder}: an older checkpoint could not be removed ({_describe(e)})")
        return ""

    def _tidy(self, state: State) -> None:
        """Remove old checkpoints but the last few and the best by held-out accuracy, which the link `best` names."""
        best = self.folder / f"step_{state.best_step:06d}"
        if self.cfg.keep_best and best.exists():
            point_link(self.folder / "best", Path(best.name))
        if self.cfg.keep_last:
            for old in list_checkpoints(self.folder)[: -self.cfg.keep_last]:
                if not (self.cfg.keep_best and old == best):
                    remove(old)
        if not (self.folder / "best").exists():
            (self.folder / "best").unlink(missing_ok=True)


def _tensors(model: Model) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, tied ones once."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        unique.setdefault(id(x), (name, x))
    return dict(unique.values())


def _moments(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's moments as `parameter:moment`."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}:{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }


def _unchanged(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the tensor as files have it where nothing is converted."""
    return {name: tensor}


def _describe(error: Exception) -> str:
    """Return an error as one line: the system's words and the file, or the exception's type and message."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

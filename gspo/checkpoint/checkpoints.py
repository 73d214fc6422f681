"""Checkpoints: everything that a run goes on from, written while it goes on.

`outputs/<run>/checkpoints/step_000050/` is a Hugging Face folder (the policy) with a `trainer/` folder beside the
weights: optimizer moments, the frozen models and the data order as safetensors, everything else in `state.json`.
Nothing is pickled. Several ranks write a shard each: whole tensors, dealt out by size and gathered one at a time, so
that no rank ever has the whole model. Between two steps the state is copied to CPU memory; a thread on every rank
writes it; at the end of a later step all ranks agree that it is written, and rank 0 adds the manifest and gives the
folder its name. A folder called `step_*` is therefore whole.
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
from gspo.checkpoint.hf_folder import ModelFolder, index_json, shard_files
from gspo.checkpoint.run_folder import latest_checkpoint, list_checkpoints
from gspo.config import Config
from gspo.distributed.transfer import full_tensor, load_like, load_weights
from gspo.distributed.world import World, split_by_size
from gspo.errors import UserError
from gspo.models.loading import resolve_path
from gspo.models.safetensors_files import open_weights, write_bytes, write_weights
from gspo.system.console import say
from gspo.system.files import PART, point_link, remove, sync_folder

Shards = dict[str, dict[str, Tensor]]  # file -> its tensors
Pieces = Callable[[str, Tensor], dict[str, Tensor]]  # a tensor -> what the files have of it, by name


@dataclass
class State:
    """Where a run stands; small, in JSON. All sampling follows from the seed and `step`."""

    step: int = 0  # rollouts done
    round: int = 0
    bad_steps: int = 0  # non-finite updates in a row
    round_rewards: list[list[float]] | None = None  # the previous self's on the held-out prompts [P, N]
    tokens_sampled: int = 0
    precision: str = ""  # what model.precision came to
    best_accuracy: float = -1.0  # on the held-out prompts
    best_step: int = 0
    torch_rng: list[int] = field(default_factory=list)

    def count_non_finite(self, skipped: int, limit: int, cause: str = "") -> None:
        """UserError when the updates of `limit` steps in a row were not finite; `cause` is what was so first."""
        self.bad_steps = self.bad_steps + 1 if skipped else 0
        if self.bad_steps >= limit:
            raise UserError(
                f"step {self.step}: updates were not finite in {limit} steps in a row{cause and f' ({cause} first)'}; "
                "the weights are as they were before. Lower optim.learning_rate, or use model.precision=fp32."
            )

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Whether this step has the best held-out accuracy so far, which is then taken down."""
        accuracy = metrics.get("heldout/accuracy", -1.0)
        if accuracy <= self.best_accuracy:
            return False
        self.best_accuracy, self.best_step = accuracy, self.step
        return True


class CheckpointWriter(threading.Thread):
    """Writes this rank's files of one checkpoint."""

    def __init__(self, part: Path, state: State, shards: Shards, small: dict[str, bytes], error: str):
        super().__init__(name="checkpoint", daemon=True)
        self.part, self.state, self.shards, self.small = part, state, shards, small
        self.files: manifest.Files = {}
        self.error = error  # why it cannot be, or was not, written

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
        except Exception as e:  # whatever it is, training can go on without this checkpoint
            self.error = _describe(e)
        self.shards = {}  # memory


class Checkpoints:
    """Saves a run, one checkpoint at a time. Every rank calls every method, at the same place."""

    def __init__(self, run: Path, cfg: Config, tokenizer: Any, world: World):
        self.folder, self.cfg, self.world = run / "checkpoints", cfg.trainer, world
        self.model_folder = ModelFolder(resolve_path(cfg.model.path), tokenizer)
        self.writing: CheckpointWriter | None = None
        self.copied = True  # training goes on while it is written

    def save(
        self,
        state: State,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        frozen: dict[str, nn.Module],
        order: dict[str, Tensor],
        at_once: bool = False,
    ) -> None:
        """Begin to write `step_<state.step>`, when the one before is written. A step that is there is kept.

        `at_once`, or without `trainer.async_save`, it is written when this returns, and on the CPU nothing is copied.
        """
        self.finish()
        target = self.folder / f"step_{state.step:06d}"
        if self.world.broadcast_from_main(target.exists):
            return
        state.torch_rng = torch.get_rng_state().tolist()
        self.copied = self.cfg.async_save and not at_once
        part = target.with_name(target.name + PART)
        shards, small = self._snapshot(policy, optimizer, frozen)
        error = ""
        if self.world.is_main:
            small["trainer/state.json"] = json.dumps(asdict(state)).encode()
            shards["trainer/order.safetensors"] = order
            try:
                small |= self.model_folder.beside(self.folder / f"beside{PART}", next(policy.parameters()).dtype)
            except Exception as e:  # the tokenizer raises kinds of its own
                error = _describe(e)
        self.writing = CheckpointWriter(part, replace(state), shards, small, error)
        self.writing.start()
        if not self.copied:
            self.finish()

    def commit(self) -> None:
        """Give the checkpoint that is being written its name, if all ranks have written it. Between two steps."""
        if self.writing and not any(self.world.gather(self.writing.is_alive())):
            self._conclude()

    def finish(self) -> None:
        """Wait until nothing is being written."""
        if self.writing:
            self.writing.join()
            self._conclude()

    def require(self, step: int) -> None:
        """UserError unless `step_<step>` is there: for the end of a run."""
        self.finish()
        if not self.world.broadcast_from_main((self.folder / f"step_{step:06d}").exists):
            before = self.world.broadcast_from_main(lambda: latest_checkpoint(self.folder))
            raise UserError(
                f"step {step} is done, but its checkpoint could not be written (see above). Make room and give the "
                f"same command again: it goes on from {before.name if before else 'the beginning'}."
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None or self.world.size == 1:  # several ranks may not meet again after an error
            self.finish()

    def _snapshot(
        self, policy: nn.Module, optimizer: torch.optim.Optimizer, frozen: dict[str, nn.Module]
    ) -> tuple[Shards, dict[str, bytes]]:
        """This rank's tensors, and the indexes that say which file has which."""
        names = {id(p): name for name, p in policy.named_parameters()}
        moments = {
            f"{names[id(p)]}:{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for p, values in optimizer.state.items()
            for key, value in values.items()
        }
        shards: Shards = {}
        small: dict[str, bytes] = {}
        self._share("model", _tensors(policy), self.model_folder.pieces, shards, small)
        self._share("trainer/optimizer", moments, _as_it_is, shards, small)
        for name, model in frozen.items():
            self._share(f"trainer/{name}", dict(model.named_parameters()), _as_it_is, shards, small)
        return shards, small

    def _share(self, stem: str, tensors: dict[str, Tensor], pieces: Pieces, shards: Shards, small: dict) -> None:
        """Gather tensors one by one, and keep those that are this rank's to write."""
        sizes = {name: x.numel() * x.element_size() for name, x in tensors.items()}
        hands = [hand for hand in split_by_size(sizes, self.world.size) if hand] or [[]]
        files = shard_files(stem, len(hands))
        owner = {name: k for k, hand in enumerate(hands) for name in hand}
        mine: dict[str, Tensor] = {}
        for name, x in tensors.items():
            full = full_tensor(x)
            if owner[name] == self.world.rank:  # on one process it is the parameter itself, which the next step changes
                kept = full.to("cpu", copy=self.copied).contiguous()
                mine |= pieces(name, kept)
        if self.world.rank < len(hands):
            shards[files[self.world.rank]] = mine
        if self.world.is_main and len(hands) > 1:
            places = {
                piece: Path(files[owner[name]]).name
                for name, x in tensors.items()
                for piece in pieces(name, torch.empty(x.shape, dtype=x.dtype, device="meta"))
            }
            small[f"{stem}.safetensors.index.json"] = index_json(sum(sizes.values()), places)

    def _conclude(self) -> None:
        done, self.writing = self.writing, None
        parts = self.world.gather((done.files, done.error))
        error = next((error for _, error in parts if error), "")
        files = {name: entry for part, _ in parts for name, entry in part.items()}
        error = self.world.broadcast_from_main(lambda: self._name(done, files, error))
        if error:
            before = self.world.broadcast_from_main(lambda: latest_checkpoint(self.folder))
            say(
                f"warning: the checkpoint of step {done.state.step} could not be written ({error}); training goes on, "
                f"the latest checkpoint is {before.name if before else 'none yet'}."
            )

    def _name(self, done: CheckpointWriter, files: manifest.Files, error: str) -> str:
        """On rank 0: the manifest, and the name; or, when anything failed, nothing. -> what failed."""
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
                say(f"warning: {done.part} cannot be removed ({left.strerror})")
            return error
        try:
            sync_folder(self.folder)
            self._tidy(done.state)
        except OSError as e:
            say(f"warning: {self.folder}: an older checkpoint could not be removed ({_describe(e)})")
        return ""

    def _tidy(self, state: State) -> None:
        """`best` -> the best by held-out accuracy, which is kept besides the last few."""
        best = self.folder / f"step_{state.best_step:06d}"
        if self.cfg.keep_best and best.exists():
            point_link(self.folder / "best", Path(best.name))
        if self.cfg.keep_last:
            for old in list_checkpoints(self.folder)[: -self.cfg.keep_last]:
                if not (self.cfg.keep_best and old == best):
                    remove(old)
        if not (self.folder / "best").exists():
            (self.folder / "best").unlink(missing_ok=True)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and what else belongs in a file of weights; tied ones once."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        unique.setdefault(id(x), (name, x))
    return dict(unique.values())


def _as_it_is(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name: tensor}


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def load_state(checkpoint: Path) -> State:
    return State(**json.loads((checkpoint / "trainer" / "state.json").read_text(encoding="utf-8")))


def load_order(checkpoint: Path) -> dict[str, Tensor]:
    """The order of training, as `Batches.state` gave it. UserError where a checkpoint has none."""
    if not (checkpoint / "trainer" / "order.safetensors").exists():
        raise UserError(
            f"{checkpoint} has no trainer/order.safetensors: it was written by an earlier version, or damaged. "
            "Resume from another one (trainer.resume=FOLDER), or start anew (trainer.resume=never)."
        )
    weights = open_weights(checkpoint / "trainer", "order")
    return {name: weights.read(name).clone() for name in weights.names}


def restore(
    checkpoint: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, frozen: dict[str, nn.Module], state: State
) -> None:
    """Put the optimizer's moments and the frozen models back; the policy was opened from the checkpoint itself.

    Each rank reads only what it holds, a tensor at a time, whatever number of ranks wrote it.
    """
    moments = open_weights(checkpoint / "trainer", "optimizer")
    keys: dict[str, list[str]] = {}
    for name in moments.names:
        keys.setdefault(name.rpartition(":")[0], []).append(name.rpartition(":")[2])
    for name, p in policy.named_parameters():
        for key in keys.get(name, []):
            moment = f"{name}:{key}"
            value = moments.read(moment).clone() if key == "step" else load_like(moment, moments.read, p)
            optimizer.state[p][key] = value
    for name, model in frozen.items():
        if not [*(checkpoint / "trainer").glob(f"{name}[.-]*safetensors*")]:
            raise UserError(
                f"{checkpoint} has no model called {name!r}: objective.anchor and reference.refresh of its run asked "
                "for none. Give them as they were, or start a run from its weights with model.path=CHECKPOINT."
            )
        load_weights(model, open_weights(checkpoint / "trainer", name).read)
    if state.torch_rng:
        torch.set_rng_state(torch.tensor(state.torch_rng, dtype=torch.uint8))

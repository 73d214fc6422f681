"""Read a checkpoint back into a run. Whatever it holds is checked before it is used.

A checkpoint that was changed by hand, or comes from somebody else, may have no manifest; tensors of a wrong shape would
be read and written out of bounds by compiled code.
"""

import json
import math
import types
import typing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gspo.checkpoint.checkpoints import Model, State, Trained
from gspo.distributed.move_weights import load_like, load_weights
from gspo.errors import UserError
from gspo.models.safetensors_files import DTYPES, Weights, open_weights

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of AdamW
CURE = (
    "Resume from another checkpoint (trainer.resume=FOLDER), or start a run from its weights (model.path=CHECKPOINT)."
)
MOST_EPOCHS = 2**30  # the epochs of prompts are int32
COUNTS = ("step", "round", "planned_steps", "total_steps", "bad_steps", "tokens_sampled", "best_step")


def load_state(checkpoint: Path) -> State:
    """Read `trainer/state.json` of a checkpoint. UserError where it is not what `State` holds."""
    file = checkpoint / "trainer" / "state.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file} cannot be read: {' '.join(str(e).split()):.200}. {CURE}") from e
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object. {CURE}")
    kinds = typing.get_type_hints(State)
    for name, value in found.items():
        if name not in kinds:
            raise UserError(f"{file} has {name!r}, which this version does not know. {CURE}")
        if not _fits(value, kinds[name]) or (name in COUNTS and value < 0):
            raise UserError(f"{file}: {name} = {str(value):.60} is not what a run writes there. {CURE}")
    state = State(**found)
    if state.precision not in ("", "fp32", "bf16"):
        raise UserError(f"{file}: precision = {state.precision:.60} is neither fp32 nor bf16. {CURE}")
    size = torch.get_rng_state().numel()
    if state.torch_rng and (len(state.torch_rng) != size or not all(0 <= x < 256 for x in state.torch_rng)):
        raise UserError(f"{file}: torch_rng is not the {size} bytes of torch's generator. {CURE}")
    if state.round_rewards is not None and len({len(row) for row in state.round_rewards}) > 1:
        raise UserError(f"{file}: the rows of round_rewards differ in length. {CURE}")
    return state


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value of JSON is of a type such as `list[list[float]] | None`; a whole number is a float too."""
    if isinstance(kind, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(kind))
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(_fits(x, inside[0]) for x in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(x, inside[1]) for x in value.values())
    if isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    return isinstance(value, kind) and (kind is not int or abs(value) < 2**63)


def load_order(checkpoint: Path) -> dict[str, Tensor]:
    """Read the data order, as `Batches.state` returned it. UserError where a checkpoint has none."""
    if not (checkpoint / "trainer" / "order.safetensors").exists():
        raise UserError(
            f"{checkpoint} has no trainer/order.safetensors: an earlier version wrote it, or it is damaged. Resume "
            "from another checkpoint (trainer.resume=FOLDER), or start anew (trainer.resume=never)."
        )
    found = _small(checkpoint, "order")
    rows = len(found["due"]) if "due" in found and found["due"].ndim == 1 else 0
    wanted = {
        "at": ((2,), torch.int64),
        "due": ((rows,), torch.int32),
        "streak": ((rows,), torch.int8),
        "mean": ((rows,), torch.float32),
        "best": ((rows,), torch.float32),
    }
    older = wanted.keys() - {"mean", "best"}
    if found.keys() not in (wanted.keys(), older):
        raise _damaged(checkpoint, "order", f"holds {', '.join(found) or 'nothing'}, not {', '.join(wanted)}")
    for name, x in found.items():
        _check(checkpoint, "order", name, x, *wanted[name])
    if bool((torch.cat([found["at"], found["due"], found["streak"]]) < 0).any()):
        raise _damaged(checkpoint, "order", "has a negative number")
    epoch, position = found["at"].tolist()
    if epoch > MOST_EPOCHS or position > rows:
        raise _damaged(checkpoint, "order", f"goes on at prompt {position} of {rows}, in epoch {epoch}")
    return found


def load_held_out(checkpoint: Path, vocab_size: int) -> dict[str, Tensor]:
    """Read the held-out responses of the round, as `HeldOutPairs.tensors` returned them; nothing where it has none."""
    if not (checkpoint / "trainer" / "held_out.safetensors").exists():
        return {}
    found = _small(checkpoint, "held_out")
    if found.keys() != {"tokens", "lengths", "anchors", "rewards"} or found["tokens"].ndim != 3:
        raise _damaged(checkpoint, "held_out", "does not hold tokens, lengths, anchors and rewards")
    shape, rewards = tuple(found["tokens"].shape), tuple(found["rewards"].shape)
    gold = (shape[0], shape[1] - 1)  # responses may have a gold solution beside them, which has no reward
    _check(checkpoint, "held_out", "tokens", found["tokens"], shape, torch.int64)
    _check(checkpoint, "held_out", "lengths", found["lengths"], shape[:2], torch.int64)
    _check(checkpoint, "held_out", "anchors", found["anchors"], shape, torch.float32)
    _check(checkpoint, "held_out", "rewards", found["rewards"], gold if rewards == gold else shape[:2], torch.float32)
    for name, limit in (("tokens", vocab_size - 1), ("lengths", shape[2])):
        if found[name].numel() and not 0 <= int(found[name].min()) <= int(found[name].max()) <= limit:
            raise _damaged(checkpoint, "held_out", f"has {name} outside of 0 to {limit}")
    return found


def _small(checkpoint: Path, stem: str) -> dict[str, Tensor]:
    """Read all tensors of a small file of `trainer/`."""
    weights = open_weights(checkpoint / "trainer", stem)
    return {name: weights.read(name).clone() for name in weights.names}


def _damaged(checkpoint: Path, stem: str, what: str) -> UserError:
    return UserError(f"{checkpoint}: trainer/{stem}.safetensors {what}: it was changed, or is of another run. {CURE}")


def _check(checkpoint: Path, stem: str, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise UserError unless a tensor that was read has this shape and dtype."""
    if tuple(x.shape) != shape or x.dtype != dtype:
        is_, want = f"{str(x.dtype)[6:]} {list(x.shape)}", f"{str(dtype)[6:]} {list(shape)}"
        raise _damaged(checkpoint, stem, f"has {name} as {is_} where {want} is expected")


def _check_stored(
    checkpoint: Path, stem: str, weights: Weights, name: str, shape: tuple[int, ...], dtype: torch.dtype | None
) -> None:
    """Raise UserError unless a file has the tensor in this shape and dtype; None: in any floating-point one."""
    if name not in weights.names:
        raise _damaged(checkpoint, stem, f"has no {name}")
    spelled, found = weights.spelled_dtype(name), weights.shape(name)
    fits = spelled in ("F64", "F32", "F16", "BF16") if dtype is None else spelled == DTYPES[dtype]
    if found != shape or not fits:
        want = f"{DTYPES[dtype] if dtype else 'floating point'} {list(shape)}"
        raise _damaged(checkpoint, stem, f"has {name} as {spelled} {list(found)} where {want} is expected")


def restore(
    checkpoint: Path,
    policy: Model,
    optimizer: torch.optim.Optimizer,
    frozen: dict[str, Model],
    state: State,
    beside: dict[str, Trained] | None = None,
) -> None:
    """Read the optimizer's moments, the frozen models, those that are trained beside the policy (`beside`, with their
    optimizers), and torch's generator; the policy was opened from the checkpoint.

    Each rank reads only its own part, a tensor at a time, whatever number of ranks wrote the checkpoint. UserError
    where a tensor is not what the model needs.
    """
    _restore_moments(checkpoint, "optimizer", policy, optimizer)
    for name, model in frozen.items():
        _restore_model(checkpoint, name, model, "objective.anchor or reference.refresh")
    for name, (model, own) in (beside or {}).items():
        _restore_model(checkpoint, name, model, "objective.algorithm or critic.shared")
        _restore_moments(checkpoint, f"{name}_optimizer", model, own)
    if state.torch_rng:
        torch.set_rng_state(torch.tensor(state.torch_rng, dtype=torch.uint8))


def _restore_moments(checkpoint: Path, stem: str, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Read an optimizer's moments of the model's parameters from a file of `trainer/`."""
    moments = open_weights(checkpoint / "trainer", stem)
    keys: dict[str, list[str]] = {}
    for name in moments.names:
        keys.setdefault(name.rpartition(":")[0], []).append(name.rpartition(":")[2])
    parameters = dict(model.named_parameters())
    for name, found in keys.items():
        if name not in parameters or set(found) != MOMENTS:
            raise _damaged(checkpoint, stem, f"holds {name}: {', '.join(found)}, which no parameter needs")
        for key in found:
            shape = () if key == "step" else tuple(parameters[name].shape)
            dtype = torch.float32 if key == "step" else parameters[name].dtype
            _check_stored(checkpoint, stem, moments, f"{name}:{key}", shape, dtype)
    for name, p in parameters.items():
        for key in keys.get(name, []):
            moment = f"{name}:{key}"
            value = moments.read(moment).clone() if key == "step" else load_like(moment, moments.read, p)
            if key == "step" and not (math.isfinite(value) and value >= 0):
                raise _damaged(checkpoint, stem, f"has {moment} = {float(value)}")
            optimizer.state[p][key] = value.to(p.device)  # the fused AdamW of CUDA reads its step there, too


def _restore_model(checkpoint: Path, name: str, model: Model, settings: str) -> None:
    """Read a model's parameters from its files of `trainer/`."""
    if not [*(checkpoint / "trainer").glob(f"{name}[.-]*safetensors*")]:
        raise UserError(
            f"{checkpoint} has no model {name!r}: {settings} was different in its run. Set them as they were, or start "
            "a new run from its weights with model.path=CHECKPOINT."
        )
    stored = open_weights(checkpoint / "trainer", name)
    for parameter, p in model.named_parameters():
        _check_stored(checkpoint, name, stored, parameter, tuple(p.shape), None)
    load_weights(model, stored.read)

"""Find settings with which a run fits its devices, among those that cost time and leave its results as they are."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gspo.config import Config
from gspo.distributed.tensor_parallel import check_tensor_parallel
from gspo.errors import UserError
from gspo.memory.footprint import GIB, Footprint
from gspo.memory.plan import fit_settings
from gspo.models.loading import load_model_config, recomputes_activations
from gspo.packing.micro_batches import token_budget
from gspo.rollout.kv_budget import most_slots
from gspo.system.console import say

FEWEST_TOKENS, FEWEST_SLOTS = 256, 8  # of a micro-batch, and of a sampler, that are tried

Change = dict[str, Any]  # parameter -> value
Rule = Callable[[Config, int, str], Change]  # configuration, ranks, device -> a change, empty where none is left


def find_fitting(cfg: Config, ranks: int, device: str, precision: str, free: int) -> tuple[Change, Config, Footprint]:
    """Change one setting after the other, always one that makes the largest part at the peak smaller, until the run
    fits in `free` bytes or no change is left -> the changes, the configuration with them, and its report.

    Each change is printed with what it comes to: a forecast of a large model takes seconds."""
    changes: Change = {}
    chosen, report = fit_settings(cfg, ranks, device, precision, free)
    settled = chosen  # with what is auto chosen, before anything is changed
    while report.peak > free and (change := _next_change(settled, report, ranks, device)):
        changes |= change
        settled = _changed(settled, change)
        chosen, report = fit_settings(settled, ranks, device, precision, free)
        settings = " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
        say(f"{settings}: {report.peak / GIB:.3g} GiB while {report.peak_phase}")
    return changes, chosen, report


def _next_change(cfg: Config, report: Footprint, ranks: int, device: str) -> Change:
    """Return the change for the largest part at the peak that has one left; nothing where none has."""
    for part in sorted(report.parts_at_peak, key=lambda name: -report.parts_at_peak[name]):
        for rule in RULES.get(part, ()):
            if change := rule(cfg, ranks, device):
                return change
    return {}


def _changed(cfg: Config, change: Change) -> Config:
    """Return a copy of the configuration with the change."""
    for key, value in change.items():
        section, name = key.split(".")
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})
    return cfg


def _recompute(cfg: Config, ranks: int, device: str) -> Change:
    done = recomputes_activations(cfg.model.gradient_checkpointing, device)
    return {} if done else {"model.gradient_checkpointing": True}


def _smaller_micro_batches(cfg: Config, ranks: int, device: str) -> Change:
    half = token_budget(cfg.optim.micro_batch_tokens) // 2
    return {"optim.micro_batch_tokens": half} if half >= FEWEST_TOKENS else {}


def _fewer_slots(cfg: Config, ranks: int, device: str) -> Change:
    half = most_slots(cfg.rollout.max_slots, device) // 2
    return {"rollout.max_slots": half} if half >= FEWEST_SLOTS else {}


def _offload_reference(cfg: Config, ranks: int, device: str) -> Change:
    done = device != "cuda" or cfg.reference.param_offload is True
    return {} if done else {"reference.param_offload": True}


def _offload_policy(cfg: Config, ranks: int, device: str) -> Change:
    return {} if device != "cuda" or cfg.optim.offload else {"optim.offload": True}


def _reduce_at_once(cfg: Config, ranks: int, device: str) -> Change:
    done = cfg.optim.gradient_reduction == "micro_batch"
    return {} if done else {"optim.gradient_reduction": "micro_batch"}


def _free_layers(cfg: Config, ranks: int, device: str) -> Change:
    return {} if cfg.model.reshard_after_forward else {"model.reshard_after_forward": True}


def _save_in_between(cfg: Config, ranks: int, device: str) -> Change:
    return {"trainer.async_save": False} if cfg.trainer.async_save else {}


def _divide_sampler(cfg: Config, ranks: int, device: str) -> Change:
    twice = 2 * cfg.rollout.tensor_model_parallel_size
    try:
        check_tensor_parallel(load_model_config(cfg.model.path), ranks, twice)
    except UserError:  # more ranks, or heads, than there are
        return {}
    return {"rollout.tensor_model_parallel_size": twice} if ranks > 1 else {}


RULES: dict[str, tuple[Rule, ...]] = {  # part -> what makes it smaller, the cheapest first
    "activations": (_recompute, _smaller_micro_batches),
    "KV cache": (_fewer_slots,),
    "logits": (_fewer_slots,),
    "prefill": (_fewer_slots,),
    "reference": (_offload_reference,),
    "gradients": (_reduce_at_once, _offload_policy),
    "optimizer": (_offload_policy,),
    "weights": (_offload_policy,),
    "gathered layers": (_free_layers,),
    "checkpoint": (_save_in_between,),
    "sampler's copy": (_divide_sampler,),
}

"""Compare the weights that a model's files hold with those that the model has, and refuse every difference.

Both ways to open a model come here: transformers' own (loading.py), which would draw what is missing at random, and
ours, which reads shards (distributed/sharded_loading.py).
"""

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from gspo.errors import UserError
from gspo.models.model_folder import quantised, wrong_folder
from gspo.models.safetensors_files import Weights
from gspo.system.console import say

NamesOfPattern = dict[str, list[str]]  # a pattern of transformers' weight conversion -> the stored tensors it matches
Sources = dict[str, tuple[WeightConverter | None, NamesOfPattern]]  # a tensor's name in the model -> what makes it
SHOWN = 4  # names in a message
OLD_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias)$")  # that older versions stored
PACKED_PARTS = re.compile(
    r"[._](qweight|qzeros|g_idx|weight_(packed|scale|scale_inv|zero_point)|absmax|quant_map|blocks|scales|SCB)$"
)


@dataclass
class Differences:
    """How the tensors of a model's files differ from those of the model."""

    missing: set[str] = field(default_factory=set)  # names in the model
    extra: set[str] = field(default_factory=set)  # names as the files have them
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)  # stored, the model's


def match_names(model: nn.Module, names: Iterable[str]) -> tuple[Sources, set[str]]:
    """Find what each tensor of the model is made of -> (that, the stored names that nothing is made of).

    A tensor is a stored one as it is (no converter), or several, converted. A converter that makes several tensors
    stands under the name of the first.
    """
    mapping = get_model_conversion_mapping(model)
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in mapping if not isinstance(transform, WeightConverter)]
    known, prefix = model.state_dict(keep_vars=True), model.base_model_prefix
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: Sources = {}
    extra = set()
    for stored in sorted(names, key=_natural_order):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
        if name not in known and stored in known:
            name, pattern = stored, None
        if name not in known:
            extra.add(stored)
        elif pattern is None:
            found[name] = None, {stored: [stored]}
        else:
            _, stored_names = found.setdefault(name, (copy.deepcopy(converter_of[pattern]), {}))
            stored_names.setdefault(pattern, []).append(stored)
    return found, extra


def _natural_order(name: str) -> list[str | int]:
    """Sort key by which experts.2 comes before experts.10: converted tensors are stacked in this order."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def check_stored(path: str, model: nn.Module, weights: Weights) -> Sources:
    """Return what each tensor of `model` is made of. UserError unless the files hold the model's tensors, no others.

    Only the files' headers are read, and tied tensors where the files hold both.
    """
    sources, extra = match_names(model, weights.names)
    tensors = model.state_dict(keep_vars=True)
    filled: dict[int, str] = {}  # a tensor of the model -> the stored one
    shapes = {}
    for name, (converter, patterns) in sources.items():
        made = [name] if converter is None else _targets(name, converter, tensors)
        names = [stored for matching in patterns.values() for stored in matching]
        if tensors[name].is_floating_point():
            for stored in names:
                check_type(path, stored, weights.spelled_dtype(stored))
        found, wanted = [weights.shape(stored) for stored in names], [tuple(tensors[target].shape) for target in made]
        if (converter is None and found != wanted) or sum(map(prod, found)) != sum(map(prod, wanted)):
            shapes[name] = found[0], wanted[0]
        for target in made:
            other = filled.setdefault(id(tensors[target]), names[0])
            if other != names[0] and not _equal(weights, other, names[0]):
                raise two_heads(path)
    missing: dict[int, str] = {}  # tied tensors under one of their names
    for name, x in tensors.items():
        if id(x) not in filled:
            missing.setdefault(id(x), name)
    refuse_differences(path, model, Differences(set(missing.values()), extra, shapes))
    return sources


def _equal(weights: Weights, name: str, other: str) -> bool:
    """Tell whether two stored tensors are the same, by reading them a thousand rows at a time."""
    shape = weights.shape(name)
    if shape != weights.shape(other):
        return False
    rows = [(slice(at, at + 1000),) for at in range(0, shape[0], 1000)]
    return all(weights.read(name, part).equal(weights.read(other, part)) for part in rows)


def _targets(first: str, converter: WeightConverter, tensors: dict[str, Tensor]) -> list[str]:
    """Return all names that a converter makes: it may make several, of the same place in the model."""
    mine = next((p for p in converter.target_patterns if p in first), None)
    if mine is None:
        return [first]
    return [name for p in converter.target_patterns if (name := first.replace(mine, p)) in tensors]


def check_type(path: str, name: str, spelled: str) -> None:
    """Raise UserError for a weight that is stored in anything but a whole float type."""
    if spelled not in ("F64", "F32", "F16", "BF16"):
        raise quantised(path, f"{name} is stored as {spelled}")


def refuse_differences(path: str, model: nn.Module, difference: Differences) -> None:
    """Raise UserError where files and model differ, naming the tensors; known buffers may be stored or not."""
    missing, extra = _without_known(path, model, difference)
    if missing or extra or difference.shapes:
        raise wrong_folder(path, _explain(model, missing, extra, difference.shapes))


def _without_known(path: str, model: nn.Module, difference: Differences) -> tuple[list[str], list[str]]:
    """Leave out buffers that older files hold, and parts that transformers leaves out of its class; say the latter."""
    buffers = {name for name, _ in model.named_buffers()}
    buffers |= {name.removeprefix(f"{model.base_model_prefix}.") for name in buffers}
    extra = {name for name in difference.extra if name not in buffers and not OLD_BUFFERS.search(name)}
    left_out = {name for name in extra if _matches(model, "_keys_to_ignore_on_load_unexpected", name)}
    left_out |= {name for name in extra if _predicts_later_tokens(model, name)}
    if left_out:
        _say_left_out(path, tuple(sorted(left_out)))
    missing = {x for x in difference.missing if not _matches(model, "_keys_to_ignore_on_load_missing", x)}
    return sorted(missing, key=_natural_order), sorted(extra - left_out, key=_natural_order)


def _matches(model: nn.Module, patterns: str, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in getattr(model, patterns, None) or ())


def _predicts_later_tokens(model: nn.Module, name: str) -> bool:
    """Tell whether a tensor belongs to layers behind the last one, which predict later tokens (DeepSeek-V3's MTP)."""
    config = model.config.get_text_config()
    more, layers = getattr(config, "num_nextn_predict_layers", 0) or 0, getattr(config, "num_hidden_layers", 0)
    at = re.search(r"\.layers\.(\d+)\.", name)
    return bool(at) and layers <= int(at[1]) < layers + more


@cache
def _say_left_out(path: str, names: tuple[str, ...]) -> None:
    say(f"note: {path}: {_list(names)}: transformers' class has no place for it; it is neither trained nor saved.")


def _explain(
    model: nn.Module,
    missing: list[str],
    extra: list[str],
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> str:
    """Return what differs, and the likeliest cure."""
    what = []
    if missing:
        what.append(f"has no weights for {_list(missing)}")
    if extra:
        what.append(f"holds {_list(extra)}, which {type(model).__name__} as of its config.json has no place for")
    if shapes:
        first, (stored, wanted) = next(iter(shapes.items()))
        more = f" (and {len(shapes) - 1} more)" if len(shapes) > 1 else ""
        what.append(f"has {first}{more} in the shape {list(stored)}, where its config.json asks for {list(wanted)}")
    return f"{'; it '.join(what)}. {_cure(missing, extra, bool(shapes))}"


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _cure(missing: list[str], extra: list[str], shapes: bool) -> str:
    """Return advice by the names that differ."""
    if any("lora_" in name or ".base_layer." in name for name in extra):
        return "These are a model and an adapter that was not merged: merge_and_unload() it, save it, and give that."
    if any(PACKED_PARTS.search(name) for name in extra):
        return "These are quantised weights, which have no gradient: give the model as it was before."
    if prefix := _wrapper(missing, extra):
        return (
            f"The names begin with {prefix!r}, of a wrapper (FSDP, DDP, torch.compile, PEFT or a trainer's own): save "
            "the model inside it, or rename the tensors."
        )
    if any(name.split(".")[0] in ("score", "classifier", "v_head", "value_head") for name in extra):
        return "It is a classifier, or a reward or value model. Give a causal language model without such a head."
    if missing and not extra and all("lm_head" in name or "embed_out" in name for name in missing):
        return (
            "If its head is its embedding, set tie_word_embeddings to true in config.json; otherwise save the model "
            "with its head (AutoModelForCausalLM)."
        )
    return (
        "Weights and config.json do not belong together, or a file is incomplete, and what is missing would be random. "
        "Give the folder with the config.json that these weights were saved with."
    )


def _wrapper(missing: list[str], extra: list[str]) -> str:
    """Return what stands before the names of all missing tensors in the files, or ""."""
    first = next((name for name in extra if missing and name.endswith(missing[0]) and name != missing[0]), "")
    prefix = first.removesuffix(missing[0]) if first else ""
    if prefix:
        return prefix if {prefix + name for name in missing} <= set(extra) else ""
    inside = {re.sub(r"\b(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", x) for x in extra}
    return "_orig_mod." if missing and set(missing) <= inside and any("_orig_mod." in x for x in extra) else ""


# ---- values ----


def two_heads(path: str) -> UserError:
    """Return the error of a head and an embedding that are tied by config.json, and differ in the files."""
    return wrong_folder(
        path,
        "has tie_word_embeddings = true in its config.json, but its files hold a head and an embedding that differ. "
        "Set it to false, if the two were trained apart, or delete the one that is not meant.",
    )


@torch.no_grad()
def refuse_non_finite(
    path: str, tensors: Iterable[tuple[str, Callable[[], Tensor] | Tensor]], may_be_zero: bool = False
) -> None:
    """Raise UserError where a tensor holds NaN or infinity, naming it and how many more there are.

    Unless they `may_be_zero`, say which matrices hold nothing but zeros.
    """
    bad: list[tuple[str, int, int]] = []
    zero: list[str] = []
    for name, x in tensors:
        x = x() if callable(x) else x
        if not x.is_floating_point():
            continue
        total = x.sum(dtype=torch.float64)  # a quick look: one pass, no copy
        if total == 0 and x.ndim > 1 and not may_be_zero and not x.any():
            zero.append(name)
        if total.isfinite():
            continue
        if count := int((~x.isfinite()).sum()):
            bad.append((name, count, x.numel()))
    if zero:
        _say_zero(path, tuple(sorted(zero, key=_natural_order)))
    if bad:
        name, count, size = bad[0]
        more = f", and so have {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise wrong_folder(
            path,
            f"has weights that are not finite: {name} has {count:,} of {size:,} (NaN or infinity){more}. They come "
            "from a training that diverged, or from a damaged file: give an earlier checkpoint, or fetch it again.",
        )


@cache
def _say_zero(path: str, names: tuple[str, ...]) -> None:
    say(
        f"warning: {path}: {_list(names)}: all weights are 0, as an export leaves them that lost a layer. What goes "
        "through there is nothing, and no gradient may pass: fetch or export the model again."
    )


def state_of(model: Any) -> Iterable[tuple[str, Tensor]]:
    """Return a model's tensors by name, tied ones once."""
    seen: dict[int, tuple[str, Tensor]] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        seen.setdefault(id(x), (name, x))
    return seen.values()

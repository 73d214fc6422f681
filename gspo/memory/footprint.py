"""What a run will take of each rank's memory, part by part and phase by phase, from config.json alone."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gspo.config import Config
from gspo.distributed.sharding import check_shard_size, check_tensor_parallel
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.memory.activations import FakeModel
from gspo.models.loading import decoder_layers, load_model_config, resolve_path
from gspo.models.precision import DTYPES
from gspo.packing.micro_batches import Row, micro_batches
from gspo.packing.pack import PackedBatch, pack_rows
from gspo.rollout.kv_budget import MOST, SHARE, answer_page_size, free_bytes, plan_slots
from gspo.rollout.sampler import shares_weights
from gspo.rollout.weight_layout import laid_out_bytes
from gspo.types import Prompt, Rollout

GIB = 2**30
CURE_OF_PART = {
    "activations": "optim.micro_batch_tokens (smaller) or model.gradient_checkpointing=true",
    "scoring": "optim.micro_batch_tokens (smaller)",
    "keys and values": "rollout.kv_memory_gib or rollout.max_slots (smaller)",
    "sampler's copy": "rollout.tensor_model_parallel_size (larger)",
    "reference": "reference.param_offload=true",
    "optimizer": "optim.offload=true, or more ranks (a larger model.shard_size)",
    "gradients": "optim.gradient_reduction=micro_batch, or more ranks",
    "weights": "optim.offload=true, or more ranks (a larger model.shard_size)",
    "gathered layers": "model.reshard_after_forward=true",
    "weights laid out": "a machine with more memory, or model.precision=bf16",
    "checkpoint": "trainer.async_save=false",
    "logits": "rollout.max_slots (smaller)",
}


@dataclass(frozen=True)
class Footprint:
    """Bytes a rank. `resident` stay; each phase adds its own on top, and the fullest decides."""

    model: str
    parameters: int
    precision: str
    ranks: int
    on: str
    resident: dict[str, int]
    phases: dict[str, dict[str, int]]
    offloaded: dict[str, int]  # in CPU memory

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + sum(self.phases[self.peak_phase].values())

    def cure(self) -> str:
        """The setting for the largest part that has one, at the peak."""
        parts = self.resident | self.phases[self.peak_phase]
        return CURE_OF_PART[max(parts, key=parts.get)]

    def summary(self) -> str:
        """In a line or two: the peak, and what it is made of."""
        parts = sorted((self.resident | self.phases[self.peak_phase]).items(), key=lambda part: -part[1])
        shown = ", ".join(f"{name} {size / GIB:.3g}" for name, size in parts[:5] if size)
        aside = f"; CPU {sum(self.offloaded.values()) / GIB:.3g}" if self.offloaded else ""
        return f"memory a rank: {self.peak / GIB:.3g} GiB at most, while {self.peak_phase} ({shown}{aside})"


def footprint(
    cfg: Config, ranks: int, on: str, precision: str, free: int, prompt_tokens: int | None = None
) -> Footprint:
    """The report of a run on `ranks` processes with a device of the kind `on` each (cpu or cuda).

    `free` bytes are what the device has to give; `prompt_tokens` is the longest prompt (None: data.max_prompt_length).
    UserError where such a run would be refused.
    """
    check_shard_size(cfg.model.shard_size, ranks)
    config, dtype = load_model_config(cfg.model.path), DTYPES[precision]
    check_tensor_parallel(config, ranks, cfg.rollout.tensor_model_parallel_size)
    sharded = ranks > 1 or (on == "cuda" and cfg.optim.offload)
    fake_model = FakeModel(config, dtype if ranks > 1 else torch.float32, cfg.model.gradient_checkpointing)
    count = sum(p.numel() for p in fake_model.model.parameters())
    resident, offloaded = _resident(cfg, ranks, on, dtype, fake_model.model, sharded)
    longest = prompt_tokens or cfg.data.max_prompt_length
    phases = {"updating": {}, "scoring": {}, "sampling": {}}

    whole = cfg.optim.gradient_reduction == "step" and ranks > 1
    away = cfg.optim.offload and on == "cuda"
    gradients = 4 * count if whole else 4 * count // _shard_size(cfg, ranks)
    (offloaded if away and not whole else phases["updating"])["gradients"] = gradients
    kept = None if cfg.model.reshard_after_forward else count * dtype.itemsize
    phases["updating"]["gathered layers"] = _gathered(fake_model.model, dtype, kept, True) if sharded else 0
    score_sharded = ranks > 1 or (on == "cuda" and cfg.reference.param_offload)
    phases["scoring"]["gathered layers"] = _gathered(fake_model.model, dtype, None, False) if score_sharded else 0

    work = _Work(cfg, ranks, precision, longest)
    phases["updating"]["activations"] = work.training(fake_model)
    phases["scoring"]["activations"] = work.scoring(fake_model)
    sampler = FakeModel(config, dtype)
    phases["sampling"] = _sampling(cfg, ranks, on, sampler, longest, work.groups, free - sum(resident.values()))
    return Footprint(resolve_path(cfg.model.path), count, precision, ranks, on, resident, phases, offloaded)


def memory_report_line(cfg: Config, world: World, precision: str, prompt_tokens: int) -> str:
    """The report in a line or two, for the start of a run on this device; a model it cannot work out stops nothing."""
    free = free_bytes(world.device)
    try:
        report = footprint(cfg, world.size, world.device.type, precision, free, prompt_tokens)
    except Exception as e:  # a class that does more than tensors without storage allow
        return f"note: what memory this model will take cannot be worked out ({type(e).__name__}: {str(e)[:200]})"
    if report.peak <= free:
        return report.summary()
    return f"warning: {report.summary()}\nand {free / GIB:.3g} GiB are free. If it ends for that, turn {report.cure()}"


def _shard_size(cfg: Config, ranks: int) -> int:
    return cfg.model.shard_size or ranks


def _resident(
    cfg: Config, ranks: int, on: str, dtype: torch.dtype, model: nn.Module, sharded: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """What stays from step to step -> (on the device, offloaded)."""
    count, shard = sum(p.numel() for p in model.parameters()), _shard_size(cfg, ranks)
    anchors = {cfg.objective.anchor} & {"opponent", "initial"}
    frozen = len(anchors | {"opponent" if cfg.reference.refresh == "round" else "initial"})
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    rounded = sum(
        sum(p.numel() for p in m.parameters())
        for m in model.modules()
        if isinstance(m, nn.Linear) and m.weight not in embeddings
    )
    reference = count * dtype.itemsize // shard if ranks > 1 else 4 * count - (4 - dtype.itemsize) * rounded
    own = {"weights": 4 * count // shard, "optimizer": 8 * count // shard}
    resident, offloaded = {}, {}
    (offloaded if on == "cuda" and cfg.optim.offload else resident).update(own)
    (offloaded if on == "cuda" and cfg.reference.param_offload else resident)["reference"] = frozen * reference
    if cfg.trainer.async_save:  # a copy of all that, while it is being written
        saved = 12 * count // ranks + frozen * reference * shard // ranks
        (offloaded if on == "cuda" else resident)["checkpoint"] = saved
    if not shares_weights(cfg.rollout.weights, sharded, dtype)[0]:
        resident["sampler's copy"] = count * dtype.itemsize // cfg.rollout.tensor_model_parallel_size
    return resident, offloaded


def _gathered(model: nn.Module, dtype: torch.dtype, kept: int | None, backward: bool) -> int:
    """Weights that are whole for a moment: what is outside the layers, and two units, one of them on its way; in the
    backward also a unit's gradient, to be summed in float32."""
    size = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = [] if head is None or head.weight is embedding.weight else [embedding, head]
    sizes = [size(unit) for unit in [*decoder_layers(model), *apart]]
    two = sum(sorted(sizes)[-2:])
    weights = (size(model) - sum(sizes) + two) * dtype.itemsize if kept is None else kept
    return weights + (4 * max(sizes) if backward else 0)


class _Work:
    """The largest micro-batch that a rank will see, of the longest prompts and answers."""

    def __init__(self, cfg: Config, ranks: int, precision: str, longest: int):
        o, n = cfg.optim, cfg.rollout.n
        self.groups = -(-cfg.data.train_batch_size // ranks)
        self.checkpointing = cfg.model.gradient_checkpointing
        self.half = precision != "fp32" and ranks == 1
        lengths = torch.full((self.groups, n), cfg.rollout.max_new_tokens)
        tokens = torch.full((self.groups, n, cfg.rollout.max_new_tokens), 1)
        tokens[..., 0] = torch.arange(n)  # answers that begin alike would share what they begin with
        prompts = [Prompt(g, (1,) * longest, "", "", "") for g in range(self.groups)]
        nothing = torch.zeros(1)
        self.rollout = Rollout(prompts, tokens, lengths, nothing, nothing, lengths > 0, [])
        steps = [
            range(k * self.groups // o.minibatches, (k + 1) * self.groups // o.minibatches)
            for k in range(o.minibatches)
        ]
        groups, limits = (
            list(max(steps, key=len)),
            {"budget": o.micro_batch_tokens, "max_rows": o.micro_batch_responses},
        )
        parts = micro_batches(self.rollout, groups, **limits, whole_groups=True)
        self.exact = o.epochs_per_rollout * o.minibatches == 1 and parts is not None
        self.parts = parts if self.exact else micro_batches(self.rollout, groups, **limits, whole_groups=False)
        limits = {k: None if v is None else 2 * v for k, v in limits.items()}
        self.scored = micro_batches(self.rollout, list(range(self.groups)), **limits, whole_groups=False)

    def _pack(self, parts: list[list[Row]]) -> PackedBatch:
        return pack_rows(self.rollout, max(parts, key=len))

    def _autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.half else nullcontext()

    def training(self, fake_model: FakeModel) -> int:
        return fake_model.training(self._pack(self.parts), self._autocast, self.exact, further=len(self.parts) > 1)

    def scoring(self, fake_model: FakeModel) -> int:
        return fake_model.scoring(self._pack(self.scored), self._autocast)


def _sampling(
    cfg: Config, ranks: int, on: str, sampler: FakeModel, longest: int, groups: int, free: int
) -> dict[str, int]:
    """Pages for keys and values, the logits of a step, and on a CPU the weights laid out for its products."""
    r, layout = cfg.rollout, sampler.layout()
    most = min(groups * r.n, MOST if r.max_slots == "auto" else r.max_slots)
    budget = max(0, int(SHARE * free)) if r.kv_memory_gib == "auto" else int(r.kv_memory_gib * GIB)
    page, sizes = answer_page_size(r.max_new_tokens), [longest] * groups
    try:
        plan = plan_slots(layout, sizes, r.n, r.max_new_tokens, most, budget, page)
    except UserError:
        if r.kv_memory_gib != "auto":
            raise
        plan = plan_slots(layout, sizes, r.n, r.max_new_tokens, 1, 2**62, page)
    tokens = plan.prompt_pages * plan.prompt_page + plan.answer_pages * plan.page
    pages = tokens * sum(layer.token_bytes for layer in layout.values()) // r.tensor_model_parallel_size
    head = sampler.model.get_output_embeddings()
    logits = plan.slots * head.weight.shape[0] * (head.weight.dtype.itemsize + (4 if on == "cuda" else 0))
    return {
        "keys and values": pages,
        "logits": logits,
        "weights laid out": laid_out_bytes(sampler.model) if on == "cpu" else 0,
    }

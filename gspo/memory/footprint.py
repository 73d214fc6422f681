"""Compute what a run will hold in each rank's memory, part by part and phase by phase, from config.json alone.

Notation of the comments: P parameters of the model, b bytes of the dtype it computes in (2 in bf16), r ranks, s ranks
that one copy of the weights is sharded over. docs/scaling.md has the same terms. All sizes are in bytes.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from gspo.algorithm.objective import find_algorithm
from gspo.config import Config
from gspo.distributed.sharding import check_shard_size, gathers_once, sharding_units
from gspo.distributed.tensor_parallel import check_tensor_parallel
from gspo.errors import UserError
from gspo.memory.activations import FakeModel
from gspo.models.loading import load_model_config, recomputes_activations
from gspo.models.lora import Lora, find_targets
from gspo.models.model_folder import resolve_path
from gspo.models.precision import DTYPES
from gspo.packing.micro_batches import Row, micro_batches, token_budget
from gspo.packing.pack import PackedBatch, pack_rows
from gspo.rollout.cpu_weight_layout import laid_out_bytes
from gspo.rollout.kv_budget import SHARE, free_bytes, most_slots, plan_slots, response_page_size
from gspo.rollout.paged_engine import PACES
from gspo.rollout.sampler import shares_weights
from gspo.system.language import word
from gspo.types import Prompt, Rollout

GIB = 2**30
FLOAT32 = 4  # bytes
# What a GPU holds beside tensors. Assumed from the documentation and reports of others; not measured yet.
CONTEXT = GIB // 2  # CUDA's own, with the kernels that are loaded
WORKSPACES = 2 * 32 * 2**20  # cuBLAS: one for each stream that computes, here the usual one and that of captures
NCCL = GIB  # buffers of one group of ranks
FRAGMENTS = 0.05  # of what tensors take at the peak: gaps between them, with expandable segments
CHANGE = {  # part -> the setting that makes it smaller
    "activations": "optim.micro_batch_tokens (smaller) or model.gradient_checkpointing=true",
    "KV cache": "rollout.kv_memory_gib or rollout.max_slots (smaller)",
    "sampler's copy": "rollout.tensor_model_parallel_size (larger)",
    "reference": "reference.param_offload=true",
    "critic": "critic.shared=true",
    "optimizer": "optim.offload=true, or more ranks (a larger model.shard_size)",
    "gradients": "optim.gradient_reduction=micro_batch, or more ranks",
    "weights": "optim.offload=true, or more ranks (a larger model.shard_size)",
    "gathered layers": "model.reshard_after_forward=true",
    "laid-out weights": "model.precision=bf16, or use a machine with more memory",
    "checkpoint": "trainer.async_save=false",
    "logits": "rollout.max_slots (smaller)",
    "prefill": "data.max_prompt_length (smaller)",
}


@dataclass(frozen=True)
class Footprint:
    """Bytes that one rank holds: `resident` parts stay, each phase adds its own; the largest phase is the peak."""

    model: str
    parameters: int
    precision: str  # fp32, bf16 or fp16
    ranks: int
    device: str  # cpu or cuda
    resident: dict[str, int]  # part -> bytes
    phases: dict[str, dict[str, int]]  # phase -> part -> bytes
    offloaded: dict[str, int]  # part -> bytes of CPU memory, when the device is a GPU

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts_at_peak(self) -> dict[str, int]:
        """Part -> bytes, in the phase that needs most."""
        return self.resident | self.phases[self.peak_phase]

    @property
    def peak(self) -> int:
        """Bytes that the rank holds at most."""
        return sum(self.parts_at_peak.values())

    def cure(self) -> str:
        """Return the setting that makes the largest part at the peak smaller."""
        return CHANGE[max(self.parts_at_peak.keys() & CHANGE.keys(), key=self.parts_at_peak.get)]

    def summary(self) -> str:
        """Return one line: the peak, its phase, and its five largest parts in GiB."""
        parts = sorted(self.parts_at_peak.items(), key=lambda part: -part[1])
        largest = ", ".join(f"{word(name)} {size / GIB:.3g}" for name, size in parts[:5] if size)
        cpu = f"; CPU {sum(self.offloaded.values()) / GIB:.3g}" if self.offloaded else ""
        return f"memory of each rank: {self.peak / GIB:.3g} GiB at most, while {self.peak_phase} ({largest}{cpu})"


@dataclass(frozen=True)
class _Setup:
    """What the sizes below depend on."""

    cfg: Config
    ranks: int  # r
    device: str
    dtype: torch.dtype  # that the model computes in
    model: nn.Module  # of fake tensors, without adapters
    lora: Lora | None

    @property
    def parameters(self) -> int:
        """P."""
        return sum(p.numel() for p in self.model.parameters())

    def trained(self, part: nn.Module | None = None) -> int:
        """Return how many parameters are trained, of the whole model or a part: P, or those of one adapter."""
        part = part or self.model
        if self.lora is None:
            return sum(p.numel() for p in part.parameters())
        inside = {id(m) for m in part.modules()}
        adapted = [
            m for name in find_targets(self.model, self.lora) if id(m := self.model.get_submodule(name)) in inside
        ]
        return sum(self.lora.rank * (m.in_features + m.out_features) for m in adapted)

    @property
    def shard_size(self) -> int:
        """s."""
        return self.cfg.model.shard_size or self.ranks

    @property
    def offloads_policy(self) -> bool:
        return self.device == "cuda" and self.cfg.optim.offload

    @property
    def offloads_reference(self) -> bool:
        return self.device == "cuda" and self.cfg.reference.param_offload is not False  # auto: where it does not fit

    @property
    def policy_is_sharded(self) -> bool:
        return self.ranks > 1 or self.offloads_policy


def footprint(
    cfg: Config, ranks: int, device: str, precision: str, free: int, prompt_tokens: int | None = None
) -> Footprint:
    """Return the memory report of a run on `ranks` processes, each with a device of the kind cpu or cuda.

    free: bytes that the device has. prompt_tokens: the longest prompt; None: data.max_prompt_length. UserError where
    the run itself would be refused.
    """
    check_shard_size(cfg.model.shard_size, ranks)
    config, dtype = load_model_config(cfg.model.path), DTYPES[precision]
    check_tensor_parallel(config, ranks, cfg.rollout.tensor_model_parallel_size)
    recomputes = recomputes_activations(cfg.model.gradient_checkpointing, device)
    lora, sampler = Lora.of(cfg.model.lora), FakeModel(config, dtype)
    trained = FakeModel(config, dtype if ranks > 1 else torch.float32, recomputes, lora, products=dtype)
    setup = _Setup(cfg, ranks, device, dtype, sampler.model, lora)
    longest = prompt_tokens or cfg.data.max_prompt_length
    work = _LargestMicroBatches(cfg, ranks, precision, longest)

    resident, offloaded = _resident(setup)
    updating, scoring = {}, {}
    unsharded_gradients = cfg.optim.gradient_reduction == "step" and setup.policy_is_sharded
    gradients = FLOAT32 * setup.trained() // (1 if unsharded_gradients else setup.shard_size)  # 4 P or 4 P / s
    (offloaded if setup.offloads_policy and not unsharded_gradients else updating)["gradients"] = gradients
    updating["gathered layers"] = _gathered_while_updating(setup) if setup.policy_is_sharded else 0
    updating["activations"] = work.training_bytes(trained)
    scoring["gathered layers"] = _gathered_while_scoring(setup)
    scoring["activations"] = work.scoring_bytes(trained)
    sampling = _sampling(setup, sampler, longest, work.groups, free - sum(resident.values()))
    phases = {"updating": updating, "scoring": scoring, "sampling": sampling}
    if device == "cuda":
        for parts in phases.values():
            parts["gaps"] = int(FRAGMENTS * (sum(resident.values()) + sum(parts.values())))
        resident["CUDA and NCCL"] = _beside_tensors(setup)
    path = resolve_path(cfg.model.path)
    return Footprint(path, setup.parameters, precision, ranks, device, resident, phases, offloaded)


def available_bytes(device: torch.device) -> int:
    """Return what a process may take of the device in all; what CUDA has taken for this one is counted in."""
    return free_bytes(device) + (CONTEXT if device.type == "cuda" else 0)


def _beside_tensors(setup: _Setup) -> int:
    """Return the bytes that a GPU holds beside tensors: CUDA's, cuBLAS's, and NCCL's for each group of ranks."""
    groups = [setup.shard_size, setup.ranks // setup.shard_size, setup.cfg.rollout.tensor_model_parallel_size]
    return CONTEXT + WORKSPACES + NCCL * sum(size > 1 for size in groups)


def _resident(setup: _Setup) -> tuple[dict[str, int], dict[str, int]]:
    """Return the parts that stay from step to step: (on the device, offloaded to the CPU)."""
    cfg, parameters, shard_size = setup.cfg, setup.parameters, setup.shard_size
    trained = setup.trained()
    moments = 2 * FLOAT32 * trained // shard_size  # Adam's two: 8 P / s
    on_device, offloaded = {}, {}
    policy_at = offloaded if setup.offloads_policy else on_device
    if setup.lora is None:
        references = len(_frozen_names(cfg)) * _reference_bytes(setup)
        policy_at.update(weights=FLOAT32 * parameters // shard_size, optimizer=moments)  # 4 P / s
        (offloaded if setup.offloads_reference else on_device)["reference"] = references
    else:  # the initial model is the base, the opponent a second adapter
        references = FLOAT32 * trained // shard_size * ("opponent" in _frozen_names(cfg))
        adapters = FLOAT32 * trained // shard_size + references
        policy_at.update(weights=_reference_bytes(setup), adapters=adapters, optimizer=moments)
    critic = 3 * FLOAT32 * parameters if _critic_has_a_body(cfg) else 0  # weights and Adam's moments: 12 P / s
    if critic:
        (offloaded if setup.offloads_policy else on_device)["critic"] = critic // shard_size
    if cfg.trainer.async_save:  # each rank's share of a copy of all that, while a thread writes it
        share = (3 * FLOAT32 * trained + critic) // setup.ranks + references * shard_size // setup.ranks
        (offloaded if setup.device == "cuda" else on_device)["checkpoint"] = share
    if not shares_weights(cfg.rollout.weights, setup.policy_is_sharded, setup.dtype, setup.lora is not None)[0]:
        tensor_parallel = cfg.rollout.tensor_model_parallel_size
        on_device["sampler's copy"] = parameters * setup.dtype.itemsize // tensor_parallel  # b P / tp
    return on_device, offloaded


def _frozen_names(cfg: Config) -> set[str]:
    """Return which frozen models the run keeps: the KL reference, and the anchor if it is another one."""
    reference = "opponent" if cfg.reference.refresh == "round" else "initial"
    return {reference} | ({cfg.objective.anchor_model} & {"opponent", "initial"})


def _critic_has_a_body(cfg: Config) -> bool:
    """Return whether a critic with a body of its own is trained beside the policy."""
    return find_algorithm(cfg.objective.algorithm).needs_critic and not cfg.critic.shared


def _reference_bytes(setup: _Setup) -> int:
    """Return the bytes of one frozen model: b P / s on several ranks.

    On one process only its linear layers are in the computing dtype; embeddings, tied heads and norms are in float32.
    """
    itemsize = setup.dtype.itemsize
    if setup.ranks > 1:
        return setup.parameters * itemsize // setup.shard_size
    embeddings = {m.weight for m in setup.model.modules() if isinstance(m, nn.Embedding)}
    linear = [m for m in setup.model.modules() if isinstance(m, nn.Linear) and m.weight not in embeddings]
    in_linear = sum(p.numel() for m in linear for p in m.parameters())
    return FLOAT32 * setup.parameters - (FLOAT32 - itemsize) * in_linear


def _two_largest_units(setup: _Setup, itemsize: int) -> int:
    """Return the bytes of weights that FSDP has gathered at the same time.

    They are the two largest units (one computes, the next is on its way) and what belongs to no unit.
    """
    sizes = _unit_sizes(setup)
    outside = setup.parameters - sum(sizes)
    return (outside + sum(sorted(sizes)[-2:])) * itemsize


def _gathered_while_scoring(setup: _Setup) -> int:
    """Return the bytes of a frozen model's weights that are gathered while it scores; with adapters, the policy's."""
    if setup.lora is not None:
        return _two_largest_units(setup, setup.dtype.itemsize) if setup.policy_is_sharded else 0
    if setup.ranks == 1 and not setup.offloads_reference:
        return 0
    if gathers_once(setup.ranks, setup.offloads_policy):
        return _reference_bytes(setup)
    return _two_largest_units(setup, setup.dtype.itemsize)


def _gathered_while_updating(setup: _Setup) -> int:
    """Return the bytes of gathered weights, and of one unit's gradient in float32 on its way to be summed."""
    itemsize = setup.dtype.itemsize if setup.ranks > 1 else FLOAT32  # one process computes under autocast
    reshards = setup.cfg.model.reshard_after_forward
    weights = _two_largest_units(setup, itemsize) if reshards else setup.parameters * itemsize
    return weights + FLOAT32 * max(setup.trained(unit) for unit in sharding_units(setup.model))


def _unit_sizes(setup: _Setup) -> list[int]:
    """Return how many parameters each unit has that FSDP gathers by itself."""
    return [sum(p.numel() for p in unit.parameters()) for unit in sharding_units(setup.model)]


class _LargestMicroBatches:
    """The largest micro-batches that a rank can get: the longest prompts, and responses of max_new_tokens."""

    def __init__(self, cfg: Config, ranks: int, precision: str, longest_prompt: int):
        optim = cfg.optim
        self.groups = -(-cfg.data.train_batch_size // ranks)
        self.autocasts = precision != "fp32" and ranks == 1
        self.rollout = _longest_rollout(self.groups, cfg.rollout.n, longest_prompt, cfg.rollout.max_new_tokens)
        bounds = [k * self.groups // optim.minibatches for k in range(optim.minibatches + 1)]
        minibatch = max((list(range(a, b)) for a, b in pairwise(bounds)), key=len)
        budget = token_budget(optim.micro_batch_tokens)
        whole = self._cut(minibatch, budget, optim.micro_batch_responses, whole_groups=True)
        self.exact = optim.epochs_per_rollout * optim.minibatches == 1 and whole is not None
        self.trained = whole
        if not self.exact:
            self.trained = self._cut(minibatch, budget, optim.micro_batch_responses)
        rows = None if optim.micro_batch_responses is None else 2 * optim.micro_batch_responses
        self.scored = self._cut(list(range(self.groups)), 2 * budget, rows)

    def _cut(
        self, groups: list[int], tokens: int, rows: int | None, whole_groups: bool = False
    ) -> list[list[Row]] | None:
        return micro_batches(self.rollout, groups, budget=tokens, max_rows=rows, whole_groups=whole_groups)

    def _largest(self, parts: list[list[Row]]) -> PackedBatch:
        return pack_rows(self.rollout, max(parts, key=len))

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16) if self.autocasts else nullcontext()

    def training_bytes(self, model: FakeModel) -> int:
        """Return the peak bytes of activations in an update."""
        accumulating = len(self.trained) > 1
        return model.training_bytes(self._largest(self.trained), self._autocast, self.exact, accumulating)

    def scoring_bytes(self, model: FakeModel) -> int:
        """Return the peak bytes of activations when the reference scores responses, twice as many at a time."""
        return model.scoring_bytes(self._largest(self.scored), self._autocast)


def _longest_rollout(groups: int, n: int, prompt_tokens: int, response_tokens: int) -> Rollout:
    """Return a rollout of `groups` prompts and `n` responses to each, all of the greatest length."""
    lengths = torch.full((groups, n), response_tokens)
    tokens = torch.full((groups, n, response_tokens), 1)
    tokens[..., 0] = torch.arange(n)  # first tokens differ: responses that begin alike would be computed once
    prompts = [Prompt(g, (1,) * prompt_tokens, "", "", "") for g in range(groups)]
    unused = torch.zeros(1)
    return Rollout(prompts, tokens, lengths, unused, unused, lengths > 0, [])


def _largest_prefill(longest_prompt: int, groups: int) -> list[int]:
    """Return the tokens of the prompts that a GPU computes at once, at most."""
    return [longest_prompt] * max(1, min(groups, PACES["cuda"].prefill_most // longest_prompt))


def _sampling(setup: _Setup, sampler: FakeModel, longest_prompt: int, groups: int, free: int) -> dict[str, int]:
    """Return the bytes of the KV cache, a prefill on a GPU, a decoding step's logits, and weights laid out for CPUs."""
    r, layout = setup.cfg.rollout, sampler.kv_layout()
    max_slots = min(groups * r.n, most_slots(r.max_slots, setup.device))
    budget = max(0, int(SHARE * free)) if r.kv_memory_gib == "auto" else int(r.kv_memory_gib * GIB)
    page, prompts = response_page_size(r.max_new_tokens), [longest_prompt] * groups
    try:
        plan = plan_slots(layout, prompts, r.n, r.max_new_tokens, max_slots, budget, page)
    except UserError:
        if r.kv_memory_gib != "auto":
            raise
        plan = plan_slots(layout, prompts, r.n, r.max_new_tokens, 1, 2**62, page)  # report what one slot would need
    tokens = plan.prompt_pages * plan.prompt_page + plan.response_pages * plan.page
    token_bytes = sum(layer.token_bytes for layer in layout.values())
    head = sampler.model.get_output_embeddings().weight  # [V, D]
    float32_copy = FLOAT32 if setup.device == "cuda" else 0
    return {
        "KV cache": tokens * token_bytes // r.tensor_model_parallel_size,
        "prefill": sampler.prefill_bytes(_largest_prefill(longest_prompt, groups)) if setup.device == "cuda" else 0,
        "logits": plan.slots * head.shape[0] * (head.dtype.itemsize + float32_copy),
        "laid-out weights": laid_out_bytes(sampler.model) if setup.device == "cpu" else 0,
    }

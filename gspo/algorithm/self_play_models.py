"""Hold policy, opponent and reference; decide when a round begins; compare the policy with the last round's."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from gspo.algorithm.critic import Critic
from gspo.algorithm.objective import kl_k3
from gspo.algorithm.pairs import preferences
from gspo.config import Config
from gspo.distributed.adapters import Adapter, initialize_adapters, load_adapter, merge_weights
from gspo.distributed.move_weights import copy_weights
from gspo.distributed.sharded_loading import allocate_and_load, meta_model
from gspo.distributed.sharding import (
    gathered_once,
    gathers_once,
    is_sharded,
    local_bytes,
    materialize,
    needs_sharding,
    shard,
    with_hybrid_mesh,
)
from gspo.distributed.tensor_parallel import shard_sampler
from gspo.distributed.world import World
from gspo.models.loading import checkpoint_activations, load_model, recomputes_activations
from gspo.models.lora import OPPONENT, POLICY, Lora, add_adapters, using_adapter
from gspo.models.precision import cast_linear_layers
from gspo.packing.logprobs import check_packing, rollout_logprobs
from gspo.packing.micro_batches import micro_batches, token_budget
from gspo.packing.probe_head import measure_head
from gspo.rollout.sampler import shares_weights
from gspo.system.console import say
from gspo.types import Rollout


class SelfPlayModels:
    """Hold the policy, the sampler, and the frozen models that the policy is measured against.

    `sampler` has the policy's weights as they are when a rollout begins: it is the policy itself
    (`rollout.weights: share`), or a copy that `refresh_sampler` brings up to date.

    `frozen` has `opponent` (the policy as it was when the round began), `initial`, or both, as the anchor and the KL
    reference need them; where the two are the same model it is held once.
    """

    def __init__(self, cfg: Config, world: World, dtype: torch.dtype = torch.float32, weights_from: Path | None = None):
        self.cfg, self.dtype = cfg, dtype
        self.world = world = with_hybrid_mesh(world, cfg.model.shard_size)
        self.kl_reference = "opponent" if cfg.reference.refresh == "round" else "initial"
        anchor = cfg.objective.anchor_model
        self.anchor = anchor if anchor in ("opponent", "initial") else None
        self.lora = Lora.of(cfg.model.lora)

        sharded, adapted = needs_sharding(world, cfg.optim.offload), self.lora is not None
        shared, why = shares_weights(cfg.rollout.weights, sharded, self.dtype, adapted)
        path = cfg.model.path if weights_from is None or adapted else str(weights_from)
        self.policy = self._open(path, frozen=False)
        self.trained = Adapter(self.policy, POLICY) if adapted else self.policy
        if adapted and weights_from is not None:
            load_adapter(self.trained, weights_from)
        with self.autocast() if adapted else nullcontext():  # whose base is in the precision of products
            self.head = measure_head(self.policy, world.device)
            check_packing(self.policy, self.head, world.device)
        if self.head is None:
            kind = self.policy.config.model_type
            say(f"{kind}: its head is no scaled or capped product, so all logits of a pack are held")
        self.frozen = {name: self._open_frozen(name) for name in {self.kl_reference, self.anchor} - {None}}
        self.sampler, self.agree = self.policy, None
        if not shared:
            tp = cfg.rollout.tensor_model_parallel_size
            self.sampler, self.agree = shard_sampler(self._open_whole(path, self.dtype), world, tp)
        if cfg.rollout.weights == "auto":
            size = f"{local_bytes(self.sampler) / 2**30:.2g} GiB on each process"
            say(f"rollout.weights=auto: {'share' if shared else f'copy, {size}, as {why}'}")

    def _open_frozen(self, name: str) -> nn.Module | Adapter:
        """Open the opponent or the initial model, which both begin as the model that training started from."""
        if self.lora is None:
            return self._open(self.cfg.model.path, frozen=True)
        return Adapter(self.policy, OPPONENT if name == "opponent" else None)

    def _open(self, path: str | None, frozen: bool) -> nn.Module:
        """Open a model from its files; as shards where there are several ranks or it is offloaded to the CPU.

        Frozen weights, also the base of adapters, are kept in the precision they are computed in, and no float32 pages
        of their files stay in memory.
        """
        cfg, world, adapted = self.cfg, self.world, self.lora is not None and not frozen
        offload = cfg.reference.param_offload is not False if frozen else cfg.optim.offload
        apart = needs_sharding(world, offload)
        bare = apart or adapted or (frozen and self.dtype != torch.float32)
        kept = self.dtype if (frozen or adapted) and world.size > 1 else torch.float32
        model = meta_model(path, kept) if bare else load_model(path)
        if frozen or adapted:
            model.requires_grad_(False)
            if world.size == 1:
                cast_linear_layers(model, self.dtype)
        if not frozen and recomputes_activations(cfg.model.gradient_checkpointing, world.device.type):
            checkpoint_activations(model)
        if not bare:
            return model.to(world.device)

        def place(m: nn.Module) -> nn.Module:
            if adapted:
                wanted = [OPPONENT] if "opponent" in (self.kl_reference, self.anchor) else []
                m = add_adapters(m, self.lora, [POLICY, *wanted])
            m = shard(m, world, self.dtype, offload) if apart else materialize(m, world)
            return initialize_adapters(m, cfg.trainer.seed)

        return allocate_and_load(place, model, path)

    def _open_whole(self, path: str | None, dtype: torch.dtype) -> nn.Module:
        """Open a whole model on this rank's device."""
        if self.world.size == 1:
            return load_model(path, dtype)
        return allocate_and_load(lambda m: materialize(m, self.world), meta_model(path, dtype), path)

    def autocast(self) -> AbstractContextManager:
        """Return the context of mixed precision for whole models; sharded ones have FSDP's own policy."""
        if self.world.size > 1 or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.world.device.type, self.dtype)

    def refresh_sampler(self) -> None:
        """Copy the policy's weights to the sampler, where it has its own: with an adapter, both merged."""
        if self.lora is not None:
            merge_weights(self.policy, self.lora.scaling, self.sampler)
        elif self.sampler is not self.policy:
            copy_weights(self.policy, self.sampler)

    def new_opponent(self) -> None:
        """Begin a round: copy the policy's weights to the opponent."""
        if "opponent" in self.frozen:
            copy_weights(self.trained, self.frozen["opponent"])

    def logprobs_under(self, model: nn.Module | Adapter, rollout: Rollout) -> Tensor:
        """Return the log-probs [G, N, L] of a rollout under one of the models. Every rank must call this."""
        if isinstance(model, Adapter):
            with using_adapter(model.model, model.name):
                return self.logprobs_under(model.model, rollout)
        o = self.cfg.optim
        parts = micro_batches(
            rollout,
            list(range(len(rollout.prompts))),
            budget=2 * token_budget(o.micro_batch_tokens),  # no activations are kept
            max_rows=None if o.micro_batch_responses is None else 2 * o.micro_batch_responses,
            whole_groups=False,
        )
        temperature, count = self.cfg.rollout.temperature, self.world.max(len(parts))
        once = model is not self.policy and is_sharded(model) and gathers_once(self.world.size, o.offload)
        with gathered_once(model) if once else nullcontext():
            return rollout_logprobs(model, self.head, rollout, parts, count, temperature, self.autocast)

    def reference_and_anchor_logprobs(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Return log-probs [G, N, L] under the KL reference and the anchor; zeros for the anchors `none` and `old`."""
        under = {name: self.logprobs_under(model, rollout) for name, model in sorted(self.frozen.items())}
        nothing = torch.zeros_like(rollout.logprobs)
        return under[self.kl_reference], under.get(self.anchor, nothing)

    def new_critic(self) -> Critic:
        """Build PPO's critic: a value head, on the policy's body or on one that is opened as the policy was."""
        body = None if self.cfg.critic.shared else self._open(self.cfg.model.path, frozen=False)
        return Critic(body, self.policy.config.get_text_config().hidden_size, self.world.device)

    def initial(self) -> nn.Module | Adapter:
        """Return the model that training started from; opened again where it is not held."""
        return self.frozen.get("initial") or self._open_frozen("initial")

    def frozen_to_keep(self) -> dict[str, nn.Module | Adapter]:
        """Return the frozen models that a checkpoint has to hold: not the base of adapters, which model.path names."""
        return {name: model for name, model in self.frozen.items() if next(iter(model.parameters()), None) is not None}


def round_of(step: int, planned_steps: int, rounds: int) -> int:
    """Return the round that `step` belongs to: of R rounds planned for S steps, round k starts at step floor(k S / R).

    A run that is longer than planned goes on with rounds of the same length.
    """
    return ((step + 1) * rounds - 1) // planned_steps


def win_rate(mine: Tensor, theirs: Tensor, margin: float) -> tuple[float, float]:
    """Return (win rate, share of ties) over all cross pairs on the same prompts; a tie counts one half.

    mine [P, N], theirs [P, M] rewards; a tie is a gap within the margin.
    """
    n = mine.shape[1]
    both = preferences(torch.cat([mine, theirs], 1), margin)
    wins, losses = both[:, :n, n:], both[:, n:, :n].transpose(1, 2)
    ties = ~(wins | losses)
    return float((wins.double() + 0.5 * ties.double()).mean()), float(ties.double().mean())


def kl_divergence_to(models: SelfPlayModels, other: nn.Module | Adapter, rollout: Rollout, world: World) -> float:
    """Estimate KL(policy || other) in nats per token: k3 over a rollout of the policy, on all ranks."""
    mine, theirs = models.logprobs_under(models.policy, rollout), models.logprobs_under(other, rollout)
    total = world.sum(float(kl_k3(mine, theirs)[rollout.mask].sum()))
    return total / world.sum(int(rollout.lengths.sum()))

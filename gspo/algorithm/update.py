"""Take the optimizer steps of one rollout, with gradients that depend neither on micro-batches nor on the number of
ranks.

The loss enters the network only through c_it = dL/dl_it, its slope at token t of response i, and a per-token KL
(notation: objective.py). The objective is evaluated once a training step:

- live: if a rollout gets one optimizer step and every group fits into one micro-batch, then in each micro-batch between
  its forward and its backward. One forward and one backward in all.
- frozen: otherwise once, at log-probs from a pass without gradients. The c_it are frozen, and each optimizer step
  minimises a clipped ratio to the policy before the update, a sum over tokens; at the first step that is the same
  gradient.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gspo.algorithm.objective import Counts, Evaluation, anything_to_learn, evaluate, frozen_loss, is_clipped, kl_loss
from gspo.config import Config
from gspo.distributed.move_weights import full_tensor, local_shard
from gspo.distributed.sharding import after_backward, before_backward
from gspo.distributed.world import World
from gspo.packing.logprobs import idle_forward, response_logprobs, rollout_logprobs, surrogate
from gspo.packing.micro_batches import Row, micro_batches, minibatch_of, token_budget
from gspo.packing.pack import PackedBatch, pack_rows
from gspo.packing.probe_head import Head
from gspo.types import Experience, Update

LossOf = Callable[[list[Row], PackedBatch], Tensor]  # the loss of one micro-batch, a scalar


def make_optimizer(policy: nn.Module, cfg: Config) -> torch.optim.AdamW:
    """Build AdamW of what is trained, with weight decay on matrices only, fused into one kernel a step."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": cfg.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(cfg.optim.beta1, cfg.optim.beta2), eps=1e-8, fused=True)


def learning_rate(step: int, total: int, cfg: Config) -> float:
    """Return the step size at `step` of `total`: linear warm-up, then constant, or linear / cosine down to
    `min_lr_ratio` at the last step."""
    o = cfg.optim
    if step < o.warmup_steps:
        return o.learning_rate * (step + 1) / o.warmup_steps
    progress = (step - o.warmup_steps) / max(1, total - 1 - o.warmup_steps)
    shapes = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return o.learning_rate * (o.min_lr_ratio + (1.0 - o.min_lr_ratio) * shapes[o.schedule])


@dataclass(frozen=True)
class FrozenTargets:
    """What every optimizer step of a rollout descends on when the coefficients are frozen. All [G, N, L]."""

    old: Tensor  # the policy's log-probs before the update
    coefficients: Tensor  # c_it at `old`
    weights: Tensor  # p_train / p_sampler, bounded, where there are several optimizer steps; else 1
    reference: Tensor
    sampled: Tensor  # bool, tokens that the KL term is about

    def of_pack(self, rows: list[Row], mask: Tensor) -> list[Tensor]:
        """Return each of the five at the M response tokens of a pack, mask [R, L]."""
        g, i = (list(x) for x in zip(*rows, strict=True))
        fields = (self.old, self.coefficients, self.weights, self.reference, self.sampled)
        return [x[g, i, : mask.shape[1]][mask] for x in fields]


class Updater:
    """Take all optimizer steps for one rollout: `run(experience, lr)`."""

    def __init__(
        self,
        policy: nn.Module,
        head: Head | None,
        optimizer: torch.optim.Optimizer,
        cfg: Config,
        world: World,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.policy, self.head, self.optimizer, self.cfg = policy, head, optimizer, cfg
        self.world, self.autocast = world, autocast

    def run(self, exp: Experience, lr: float) -> Update:
        """Update the policy on one rollout. Every rank must call this."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        o, everything = self.cfg.optim, list(range(len(exp.places)))
        whole_groups = self._micro_batches(exp, everything, whole_groups=True)
        if o.epochs_per_rollout * o.minibatches == 1 and self.world.max(int(whole_groups is None)) == 0:
            return self._run_live(exp, whole_groups)
        return self._run_frozen(exp, self._micro_batches(exp, everything, whole_groups=False))

    def _run_live(self, exp: Experience, parts: list[list[Row]]) -> Update:
        """Take one step on the exact loss, micro-batches of whole groups."""
        cfg, n, samples = self.cfg.objective, exp.rollout.tokens.shape[1], exp.rollout.samples_per_group
        counts, sampled = self._counts(exp, exp.batch_groups), exp.rollout.sampled_mask
        update, terms = Update(torch.zeros_like(exp.rollout.logprobs)), {}
        coefs = torch.zeros_like(update.logprobs)

        def loss_of(rows: list[Row], packed: PackedBatch) -> Tensor:
            members = [g for g, i in rows if i == 0]
            logprobs = response_logprobs(self.policy, self.head, packed, self.cfg.rollout.temperature)  # [R, L]
            grouped = logprobs.detach().view(len(members), n, -1)
            width = grouped.shape[-1]
            found = self._evaluate(exp, members, grouped, counts)
            update.logprobs[members, :, :width] = grouped
            coefs[members, :, :width] = found.coefficients
            add_terms(terms, found.terms)
            loss = (found.coefficients.flatten(0, 1) * logprobs).sum()
            if cfg.kl_coef:
                reference, mask = (x[members, :, :width].flatten(0, 1) for x in (exp.reference_logprobs, sampled))
                kl = cfg.kl_coef * kl_loss(logprobs, reference, mask, samples, counts)
                add_terms(terms, {"kl": kl.detach()})
                loss = loss + kl
            return loss * self.world.size

        self._accumulate_gradient(exp, parts, loss_of)
        self._step(exp, update, coefs)
        update.terms = {"kl": 0.0} | {name: float(value) for name, value in terms.items()}
        return update

    def _run_frozen(self, exp: Experience, parts: list[list[Row]]) -> Update:
        """Freeze the coefficients at the policy as it stands, then take every step of every epoch."""
        cfg, o, rollout = self.cfg.objective, self.cfg.optim, exp.rollout
        settings = self.world.max(len(parts)), self.cfg.rollout.temperature, self.autocast
        old = rollout_logprobs(self.policy, self.head, rollout, parts, *settings)
        update, terms, coefs = Update(old), {}, torch.zeros_like(old)
        minibatches = self._minibatches(exp)
        for members, counts in minibatches:
            found = self._evaluate(exp, members, old[members], counts)
            coefs[members] = found.coefficients
            add_terms(terms, found.terms, share=counts.groups / exp.batch_groups)
        mask, whole_batch = rollout.sampled_mask, self._counts(exp, exp.batch_groups)
        kl = cfg.kl_coef * kl_loss(old, exp.reference_logprobs, mask, rollout.samples_per_group, whole_batch)
        update.terms = {name: float(value) for name, value in (terms | {"kl": kl}).items()}

        weights = torch.ones_like(old)
        if o.epochs_per_rollout * o.minibatches > 1:
            drift = (old - rollout.logprobs).exp().clamp_max(cfg.max_mismatch_weight)
            weights = torch.where(rollout.sampled[..., None], drift, weights)
        targets = FrozenTargets(old, coefs, weights, exp.reference_logprobs, mask)
        for _ in range(o.epochs_per_rollout):
            for members, counts in minibatches:
                self._frozen_step(exp, members, counts, targets, update)
        return update

    def _frozen_step(
        self, exp: Experience, members: list[int], counts: Counts, targets: FrozenTargets, update: Update
    ) -> None:
        """Take the optimizer step of one mini-batch, of which this rank has the groups `members`."""
        cfg, samples = self.cfg.objective, exp.rollout.samples_per_group

        def loss_of(rows: list[Row], packed: PackedBatch) -> Tensor:
            fixed = targets.of_pack(rows, packed.mask)

            def slope(logprob: Tensor, tokens: slice | Tensor) -> Tensor:
                old, coef, weight, reference, sampled = (x[tokens] for x in fixed)
                update.clipped += is_clipped(logprob, old, coef, cfg).sum()
                update.ratios += len(logprob)
                with torch.enable_grad():
                    leaf = logprob.detach().requires_grad_()
                    loss = frozen_loss(leaf, old, coef, weight, cfg)
                    loss = loss + cfg.kl_coef * kl_loss(leaf, reference, sampled, samples, counts)
                return torch.autograd.grad(loss, leaf)[0] * self.world.size

            return surrogate(self.policy, self.head, packed, self.cfg.rollout.temperature, slope)

        self._accumulate_gradient(exp, self._micro_batches(exp, members, whole_groups=False), loss_of)
        self._step(exp, update, targets.coefficients[members])

    def _minibatches(self, exp: Experience) -> list[tuple[list[int], Counts]]:
        """Return this rank's groups of each mini-batch, and the mini-batch's counts over all ranks.

        Where there are fewer groups than mini-batches, the empty ones are left out.
        """
        k = self.cfg.optim.minibatches
        owner = [minibatch_of(place, exp.batch_groups, k) for place in range(exp.batch_groups)]
        return [
            ([g for g, place in enumerate(exp.places) if owner[place] == m], self._counts(exp, owner.count(m)))
            for m in range(k)
            if m in owner
        ]

    def _counts(self, exp: Experience, groups: int) -> Counts:
        return Counts(groups, exp.batch_pairs / max(1, exp.batch_groups))

    def _evaluate(self, exp: Experience, members: list[int], logprobs: Tensor, counts: Counts) -> Evaluation:
        """Evaluate the objective for some groups at log-probs [G, N, L]; the anchor `old` is these."""
        groups = exp.groups.select(members, width=logprobs.shape[-1])
        if self.cfg.objective.anchor_model == "old":
            groups = replace(groups, anchors=logprobs)
        return evaluate(logprobs, groups, self.cfg.objective, counts)

    def _micro_batches(self, exp: Experience, groups: list[int], whole_groups: bool) -> list[list[Row]] | None:
        o = self.cfg.optim
        limits = {"budget": token_budget(o.micro_batch_tokens), "max_rows": o.micro_batch_responses}
        return micro_batches(exp.rollout, groups, **limits, whole_groups=whole_groups)

    def _accumulate_gradient(self, exp: Experience, parts: list[list[Row]], loss_of: LossOf) -> None:
        """Sum the gradient over micro-batches and ranks. FSDP averages gradients over ranks and a sum is needed, so
        each loss is multiplied by the number of ranks."""
        self.optimizer.zero_grad(set_to_none=True)
        count, cfg = self.world.max(len(parts)), self.cfg
        keep_weights, reduce_once = not cfg.model.reshard_after_forward, cfg.optim.gradient_reduction == "step"
        for k in range(count):
            before_backward(self.policy, k == count - 1, keep_weights, reduce_once)
            with self.autocast():
                if k < len(parts):
                    loss = loss_of(parts[k], pack_rows(exp.rollout, parts[k]))
                else:
                    loss = 0.0 * idle_forward(self.policy, self.head, self.world.device).sum()
            loss.backward()
        after_backward(self.policy)

    def _step(self, exp: Experience, update: Update, coefs: Tensor) -> None:
        """Clip the gradient and take one optimizer step; coefs [G, N, L] are what it was made of on this rank.

        No step is taken where the gradient is not finite, nor where there is nothing to learn: AdamW would make a full
        step of the KL term alone.
        """
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        norm = float(full_tensor(total))
        update.grad_norms.append(norm)
        if not math.isfinite(norm):
            update.skipped += 1
            update.not_finite = update.not_finite or self._first_not_finite(exp, update.logprobs, coefs)
        elif self.world.max(int(anything_to_learn(coefs))) == 0:
            update.empty += 1
        else:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.cfg.optim.grad_clip, total)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _first_not_finite(self, exp: Experience, logprobs: Tensor, coefs: Tensor) -> str:
        """Name what was not finite first in a step, in the order of computation. Every rank must call this."""
        computed = {
            "the reference's log-probs": exp.reference_logprobs,
            "the anchor's log-probs": exp.groups.anchors,
            "the policy's log-probs": logprobs,
            "the loss's slope at finite log-probs": coefs,
        }
        # A backward reaches the last layers first, and what is not finite there spreads to those before.
        for name, p in reversed(list(self.policy.named_parameters())):
            if p.grad is not None:
                computed[f"the gradient of {name}, at a finite loss"] = local_shard(p.grad)
        bad = ((place, name) for place, (name, x) in enumerate(computed.items()) if not x.isfinite().all())
        return min(self.world.gather(next(bad, (len(computed), "the gradient's norm alone"))))[1]


def add_terms(total: dict[str, Tensor], terms: dict[str, Tensor], share: float = 1.0) -> None:
    """Add `share` of each term to `total`, in place."""
    for name, value in terms.items():
        total[name] = total.get(name, 0.0) + share * value

"""Experience -> optimizer steps, with gradients that depend neither on micro-batches nor on the number of ranks.

The loss enters the network only through c_it = dL/dl_it and a per-token KL. With one optimizer step a rollout, and
groups that fit a micro-batch whole, the exact loss is evaluated in one forward and one backward (`live`). Otherwise a
pass without gradients gives every l_it, the c_it are frozen, and each optimizer step minimises a clipped ratio to the
policy that sampled (`frozen`), a sum over tokens; at the first step that is the same gradient.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from gspo.algorithm.objective import ALGORITHMS, Counts, Groups, coefficients, frozen_loss, kl_loss
from gspo.config import Config
from gspo.distributed.sharding import after_backward, before_backward
from gspo.distributed.transfer import full_tensor, local_shard
from gspo.distributed.world import World
from gspo.packing.head import Head
from gspo.packing.logprobs import idle_forward, response_logprobs, rollout_logprobs, surrogate
from gspo.packing.micro_batches import Row, micro_batches, minibatch_of
from gspo.packing.pack import PackedBatch, pack_rows
from gspo.types import Experience, Update

LossOf = Callable[[list[Row], PackedBatch], Tensor]  # of a micro-batch


def make_optimizer(policy: nn.Module, cfg: Config) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, in one pass over memory."""
    matrices = [p for p in policy.parameters() if p.ndim > 1]
    vectors = [p for p in policy.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": cfg.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(cfg.optim.beta1, cfg.optim.beta2), eps=1e-8, fused=True)


def learning_rate(step: int, total: int, cfg: Config) -> float:
    """Linear warm-up, then constant, or linear / cosine down to `min_lr_ratio` at the last step."""
    o = cfg.optim
    if step < o.warmup_steps:
        return o.learning_rate * (step + 1) / o.warmup_steps
    progress = (step - o.warmup_steps) / max(1, total - 1 - o.warmup_steps)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[
        o.schedule
    ]
    return o.learning_rate * (o.min_lr_ratio + (1.0 - o.min_lr_ratio) * shape)


class Updater:
    """Owns nothing but references to the policy and its optimizer; `run` is one call per rollout."""

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

    def cut(self, exp: Experience, groups: list[int], whole_groups: bool) -> list[list[Row]] | None:
        o = self.cfg.optim
        return micro_batches(
            exp.rollout,
            groups,
            budget=o.micro_batch_tokens,
            max_rows=o.micro_batch_responses,
            whole_groups=whole_groups,
        )

    def run(self, exp: Experience, lr: float) -> Update:
        """All optimizer steps for one rollout."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        o, everything = self.cfg.optim, list(range(len(exp.rollout.prompts)))
        uncut = self.cut(exp, everything, whole_groups=True)
        live = o.epochs_per_rollout * o.minibatches == 1 and self.world.max(int(uncut is None)) == 0
        update = Update(torch.zeros_like(exp.rollout.logprobs))
        if live:
            self._live_step(exp, uncut, update)
        else:
            parts = self.cut(exp, everything, whole_groups=False)
            update.logprobs = rollout_logprobs(
                self.policy,
                self.head,
                exp.rollout,
                parts,
                self.world.max(len(parts)),
                self.cfg.rollout.temperature,
                self.autocast,
            )
            for _ in range(o.epochs_per_rollout):
                for k in range(o.minibatches):
                    self._frozen_step(exp, k, update)
        update.terms = self._terms(exp, update.logprobs)
        return update

    def groups_of(self, exp: Experience, rows: list[int], logprobs: Tensor) -> Groups:
        """The fixed part of these groups; the anchor `old` is where the policy stands now, logprobs [G, N, L]."""
        width = logprobs.shape[-1]
        anchors = logprobs.detach() if self.cfg.objective.anchor == "old" else exp.anchors[rows][..., :width]
        return Groups(anchors, exp.rewards[rows], exp.beats[rows], exp.forks[rows], exp.rollout.lengths[rows])

    def _counts(self, exp: Experience, groups: int) -> Counts:
        return Counts(groups, exp.batch_pairs / max(1, exp.batch_groups))

    def _live_step(self, exp: Experience, parts: list[list[Row]], update: Update) -> None:
        cfg, n = self.cfg.objective, exp.rollout.tokens.shape[1]
        counts = self._counts(exp, exp.batch_groups)

        def part(rows: list[Row], packed: PackedBatch) -> Tensor:
            members = [g for g, i in rows if i == 0]
            logprobs = response_logprobs(self.policy, self.head, packed, self.cfg.rollout.temperature)
            grouped = logprobs.double().view(len(members), n, -1)
            update.logprobs[members, :, : grouped.shape[2]] = grouped.detach().float()
            terms = ALGORITHMS[cfg.algorithm](grouped, self.groups_of(exp, members, grouped), cfg, counts)
            loss = sum(terms.values())
            if cfg.kl_coef:
                reference, sampled = (x[..., : grouped.shape[2]].flatten(0, 1) for x in self._kl_of(exp, members))
                loss = loss + cfg.kl_coef * kl_loss(logprobs, reference, sampled, n - exp.given, counts)
            return loss * self.world.size

        self._descend(exp, parts, part)
        every = list(range(len(exp.positions)))
        coefs = coefficients(update.logprobs, self.groups_of(exp, every, update.logprobs), cfg, counts)
        self._step(exp, update, coefs)

    def _frozen_step(self, exp: Experience, k: int, update: Update) -> None:
        o, cfg = self.cfg.optim, self.cfg.objective
        size = [minibatch_of(p, exp.batch_groups, o.minibatches) for p in range(exp.batch_groups)].count(k)
        if size == 0:  # fewer groups than mini-batches
            return
        members = [g for g, p in enumerate(exp.positions) if minibatch_of(p, exp.batch_groups, o.minibatches) == k]
        counts = self._counts(exp, size)
        every = list(range(len(exp.positions)))
        coefs = coefficients(update.logprobs, self.groups_of(exp, every, update.logprobs), cfg, counts)
        n = update.logprobs.shape[1] - exp.given
        weights = torch.ones_like(update.logprobs)
        if o.epochs_per_rollout * o.minibatches > 1:
            drift = (update.logprobs - exp.rollout.logprobs)[:, :n].exp()
            weights[:, :n] = drift.clamp_max(cfg.max_mismatch_weight)

        def part(rows: list[Row], packed: PackedBatch) -> Tensor:
            g, i = (list(x) for x in zip(*rows, strict=True))
            fixed = (update.logprobs, coefs, weights, *self._kl_of(exp, slice(None)))
            fixed = [x[g, i, : packed.mask.shape[1]][packed.mask] for x in fixed]

            def slope(logprob: Tensor, tokens: slice | Tensor) -> Tensor:
                old, coef, weight, reference, sampled = (x[tokens] for x in fixed)
                with torch.enable_grad():
                    leaf = logprob.detach().requires_grad_()
                    loss = frozen_loss(leaf, old, coef, weight, cfg)
                    loss = loss + cfg.kl_coef * kl_loss(leaf, reference, sampled, n, counts)
                return torch.autograd.grad(loss, leaf)[0] * self.world.size

            return surrogate(self.policy, self.head, packed, self.cfg.rollout.temperature, slope)

        self._descend(exp, self.cut(exp, members, whole_groups=False), part)
        self._step(exp, update, coefs[members])

    def _kl_of(self, exp: Experience, groups: list[int] | slice) -> tuple[Tensor, Tensor]:
        """The reference's log-probs, and which tokens the KL term is about: the sampled ones. [G, N, L]"""
        sampled = exp.rollout.mask.clone()
        sampled[:, sampled.shape[1] - exp.given :] = False
        return exp.reference_logprobs[groups], sampled[groups]

    def _terms(self, exp: Experience, logprobs: Tensor) -> dict[str, float]:
        """This rank's share of each loss term at the log-probs [G, N, L] before the update."""
        every, n = list(range(len(exp.positions))), logprobs.shape[1] - exp.given
        counts, groups = self._counts(exp, exp.batch_groups), self.groups_of(exp, every, logprobs)
        terms = ALGORITHMS[self.cfg.objective.algorithm](logprobs.double(), groups, self.cfg.objective, counts)
        kl = kl_loss(logprobs[:, :n], exp.reference_logprobs[:, :n], exp.rollout.mask[:, :n], n, counts)
        return {name: float(value) for name, value in (terms | {"kl": self.cfg.objective.kl_coef * kl}).items()}

    def _descend(self, exp: Experience, parts: list[list[Row]], loss_of: LossOf) -> None:
        """Accumulate the gradient over micro-batches. FSDP averages over ranks, and our parts are meant to be summed:
        losses come times the number of ranks."""
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

    def _first_not_finite(self, exp: Experience, logprobs: Tensor, coefs: Tensor) -> str:
        """Name what was not finite first in a step, in the order of computation. Every rank must call this."""
        computed = {
            "the reference's log-probs": exp.reference_logprobs,
            "the anchor's log-probs": exp.anchors,
            "the policy's log-probs": logprobs,
            "the loss's slope at finite log-probs": coefs,
        }
        # A backward comes to the last layers first, and what is not finite there spreads to those before.
        for name, p in reversed(list(self.policy.named_parameters())):
            if p.grad is not None:
                computed[f"the gradient of {name}, at a finite loss"] = local_shard(p.grad)
        bad = ((place, name) for place, (name, x) in enumerate(computed.items()) if not x.isfinite().all())
        return min(self.world.gather(next(bad, (len(computed), "the gradient's norm alone"))))[1]

    def _step(self, exp: Experience, update: Update, coefs: Tensor) -> None:
        """Clip the gradient and take one optimizer step; coefs [G, N, L] are what it was made of on this rank."""
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        norm = float(full_tensor(total))
        update.grad_norms.append(norm)
        if not math.isfinite(norm):
            update.skipped += 1
            update.not_finite = update.not_finite or self._first_not_finite(exp, update.logprobs, coefs)
        elif self.world.max(int(coefs.any())) == 0:
            update.empty += 1
        else:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.cfg.optim.grad_clip, total)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

"""Judge responses by a value function, and train it: the critic of PPO.

V(s_t) is the reward to be expected after the first t tokens of a response. It is a linear function of the hidden state
of token t - 1 (the prompt's last, for t = 0), by a body of the critic's own or by the policy's (`critic.shared`). The
head begins at 0, so the first advantages are the rewards themselves.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gspo.algorithm.update import make_optimizer
from gspo.config import Config
from gspo.distributed.move_weights import full_tensor
from gspo.distributed.sharding import after_backward, average_gradients, before_backward
from gspo.distributed.world import World
from gspo.packing.logprobs import idle_pack, response_hidden
from gspo.packing.micro_batches import Row, micro_batches, minibatch_of, token_budget
from gspo.packing.pack import PackedBatch, pack_rows
from gspo.types import Experience, Rollout, ValueTargets


def token_rewards(
    rewards: Tensor, lengths: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """Return the reward of each token [G, N, L]: the response's at its last one, less kl_coef (log pi - log pi_ref)."""
    last = torch.arange(mask.shape[-1], device=mask.device) == lengths[..., None] - 1
    return last * rewards.double()[..., None] - kl_coef * torch.where(mask, (logprobs - reference).double(), 0.0)


def advantages_by_gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> Tensor:
    """Return A_t = d_t + gamma lam A_{t+1}, d_t = r_t + gamma V(s_{t+1}) - V(s_t) (GAE, arXiv 1506.02438, eq. 16).

    rewards [G, N, L], values [G, N, L + 1], lengths [G, N] -> [G, N, L], 0 in the padding. The value behind the last
    token counts as it is given: 0 of a response that ended, the critic's of one that was cut off.
    """
    changes = rewards + gamma * values[..., 1:] - values[..., :-1]
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(rewards[..., 0])
    for t in reversed(range(rewards.shape[-1])):
        running = torch.where(t < lengths, changes[..., t] + gamma * lam * running, 0.0)
        advantages[..., t] = running
    return advantages


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return each token's 0.5 max((V - R)^2, (V_clipped - R)^2), V_clipped within `clip` of the value before the
    update."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


class Critic(nn.Module):
    """A value head on a body: `body` is None where it is the policy's."""

    def __init__(self, body: nn.Module | None, hidden_size: int, device: torch.device):
        super().__init__()
        self.body, self.value = body, nn.Linear(hidden_size, 1, device=device)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, policy: nn.Module, packed: PackedBatch) -> Tensor:
        """Return V(s_t) before each response token, [R, L], 0 in the padding."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.body is not None):
            hidden = response_hidden(policy if self.body is None else self.body, packed)
        values = (hidden.float() * self.value.weight[0]).sum(-1) + self.value.bias  # in float32 under autocast, too
        if packed.token_of_response is not None:
            values = values.index_select(0, packed.token_of_response)
        return values.new_zeros(packed.mask.shape).masked_scatter(packed.mask, values)


class CriticUpdater:
    """Give an experience its advantages (`judge`), and train the critic on what became of it (`run`)."""

    def __init__(
        self,
        critic: Critic,
        policy: nn.Module,
        cfg: Config,
        world: World,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.critic, self.policy, self.cfg, self.world, self.autocast = critic, policy, cfg, world, autocast
        self.optimizer = make_optimizer(critic, cfg)

    @torch.no_grad()
    def values(self, rollout: Rollout) -> Tensor:
        """Return V(s_t) [G, N, L + 1] before each token, and behind the last one of those that were cut off; else 0."""
        behind = replace(
            rollout,
            tokens=pad(rollout.tokens, (0, 1)),  # a token more, so that the state before it is computed
            logprobs=pad(rollout.logprobs, (0, 1)),
            entropy=pad(rollout.entropy, (0, 1)),
            lengths=rollout.lengths + (~rollout.finished).long(),
        )
        parts, out = self._micro_batches(behind, list(range(len(rollout.prompts)))), torch.zeros_like(behind.logprobs)
        for k in range(self.world.max(len(parts))):
            with self.autocast():
                if k >= len(parts):
                    self.critic(self.policy, idle_pack(out.device))
                    continue
                found = self.critic(self.policy, pack_rows(behind, parts[k]))
            g, i = zip(*parts[k], strict=True)
            out[list(g), list(i), : found.shape[1]] = found
        return out

    def judge(self, exp: Experience) -> Experience:
        """Return the experience with its advantages, over the mean length, and the critic's targets.

        PPO's loss is then the mean over the batch's tokens. Every rank must call this.
        """
        cfg, rollout, mask = self.cfg.critic, exp.rollout, exp.rollout.mask
        kl_coef = self.cfg.objective.kl_coef if self.cfg.objective.kl_in == "reward" else 0.0
        rewards = token_rewards(
            exp.groups.rewards, rollout.lengths, rollout.logprobs, exp.reference_logprobs, mask, kl_coef
        )
        values = self.values(rollout).double()
        advantages = advantages_by_gae(rewards, values, rollout.lengths, cfg.gamma, cfg.gae_lambda)
        returns = torch.where(mask, advantages + values[..., :-1], 0.0)
        known = advantages[mask]
        tokens, total = self.world.sum(known.numel()), self.world.sum(float(known.sum()))
        responses = self.world.sum(rollout.lengths.numel())
        if cfg.normalize_advantages:
            mean = total / max(1, tokens)
            variance = self.world.sum(float((known - mean).square().sum())) / max(1, tokens)
            advantages = torch.where(mask, (advantages - mean) / (variance**0.5 + 1e-8), 0.0)
        scaled = advantages * (responses / max(1, tokens))
        targets = ValueTargets(values[..., :-1].float(), returns.float(), int(tokens))
        return replace(exp, groups=replace(exp.groups, advantages=scaled), values=targets)

    def run(self, exp: Experience, step: int) -> dict[str, float]:
        """Take the critic's optimizer steps, as many as the policy's; return its curves. Every rank must call this."""
        cfg, optim, targets = self.cfg.critic, self.cfg.optim, exp.values
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.learning_rate * min(1.0, (step + 1) / max(1, cfg.warmup_steps))
        curves = self._explained(exp)
        totals, norms = torch.zeros(3, dtype=torch.float64), []
        owner = [minibatch_of(place, exp.batch_groups, optim.minibatches) for place in exp.places]
        for _ in range(optim.epochs_per_rollout):
            for m in range(min(optim.minibatches, exp.batch_groups)):
                members = [g for g, own in enumerate(owner) if own == m]
                tokens = self.world.sum(int(exp.rollout.lengths[members].sum()))
                norms.append(self._step(exp, targets, members, tokens, totals))
        loss, clipped, seen = (self.world.sum(float(x)) for x in totals)
        curves |= {"critic/loss": loss / max(1, seen), "critic/clip_share": clipped / max(1, seen)}
        return curves | {"critic/grad_norm": sum(norms) / max(1, len(norms))}

    def _step(self, exp: Experience, targets: ValueTargets, members: list[int], tokens: float, totals: Tensor) -> float:
        """Take one optimizer step on the mean loss over the tokens of a mini-batch; return the gradient's norm."""
        parts, world, body = self._micro_batches(exp.rollout, members), self.world, self.critic.body
        count, cfg = world.max(len(parts)), self.cfg
        keep, once = not cfg.model.reshard_after_forward, cfg.optim.gradient_reduction == "step"
        self.optimizer.zero_grad(set_to_none=True)
        for k in range(count):
            if body is not None:
                before_backward(body, k == count - 1, keep, once)
            with self.autocast():
                if k < len(parts):
                    loss = self._loss(exp, targets, parts[k], totals) / tokens
                else:
                    loss = 0.0 * self.critic(self.policy, idle_pack(world.device)).sum()
            (loss * world.size).backward()
        if body is not None:
            after_backward(body)
        average_gradients(self.critic.value.parameters(), world)
        return self._clip_and_step()

    def _loss(self, exp: Experience, targets: ValueTargets, rows: list[Row], totals: Tensor) -> Tensor:
        """Return the summed loss of a micro-batch, and add (loss, clipped tokens, tokens) to `totals`."""
        packed = pack_rows(exp.rollout, rows)
        g, i = (list(x) for x in zip(*rows, strict=True))
        values = self.critic(self.policy, packed)[packed.mask]
        width = packed.mask.shape[1]
        old, returns = (x[g, i, :width][packed.mask] for x in (targets.old, targets.returns))
        loss = value_loss(values, old, returns, self.cfg.critic.clip).sum()
        moved = (values.detach() - old).abs() > self.cfg.critic.clip
        totals += torch.tensor([float(loss.detach()), float(moved.sum()), float(len(values))], dtype=torch.float64)
        return loss

    def _clip_and_step(self) -> float:
        """Clip the gradient, of shards and of the head, and take the step unless it is not finite; return its norm."""
        parameters = [p for p in self.critic.parameters() if p.grad is not None]
        squares = sum(float(full_tensor(torch.nn.utils.get_total_norm([p.grad]))) ** 2 for p in parameters)
        norm = squares**0.5
        if norm < float("inf"):  # not where it is NaN, either
            scale = min(1.0, self.cfg.optim.grad_clip / (norm + 1e-6))
            for p in parameters:
                p.grad.mul_(scale)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _explained(self, exp: Experience) -> dict[str, float]:
        """Return the critic's curves before its update: 1 - Var(R - V) / Var(R) over all tokens, and its mean value."""
        mask, targets = exp.rollout.mask, exp.values
        old, returns = targets.old[mask].double(), targets.returns[mask].double()

        def variance(x: Tensor) -> float:
            mean = self.world.sum(float(x.sum())) / max(1, targets.batch_tokens)
            return self.world.sum(float((x - mean).square().sum()))

        error, spread = variance(returns - old), variance(returns)
        value = self.world.sum(float(old.sum())) / max(1, targets.batch_tokens)
        found = {"critic/value_mean": value}
        return found | ({"critic/explained_variance": 1 - error / spread} if spread > 0 else {})

    def _micro_batches(self, rollout: Rollout, groups: list[int]) -> list[list[Row]]:
        o = self.cfg.optim
        limits = {"budget": token_budget(o.micro_batch_tokens), "max_rows": o.micro_batch_responses}
        return micro_batches(rollout, groups, **limits, whole_groups=False)

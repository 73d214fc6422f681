"""Keep the best response that each prompt has had, for a later group of the prompt that has none as good.

There it takes the place of the group's last response, so that a group has N members as ever. It was not sampled by the
policy as it is (`Rollout.sampled`): neither the KL term nor the metrics count it, and its tokens count by their ratio
to the policy that sampled them (`off_policy_weights` in update.py). docs/algorithm.md says what that makes of the
gradient.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from gspo.algorithm.pairs import TOLERANCE, preferences
from gspo.distributed.world import World
from gspo.types import Rollout, Scores

MOST_TOKENS = 2**22  # that are kept, 32 MiB; the oldest winners go first


@dataclass(frozen=True)
class Winner:
    """A response of an earlier rollout, on the CPU."""

    tokens: Tensor  # [L] int32
    logprobs: Tensor  # [L] float32, the sampler's when it was sampled
    reward: float


class StoredWinners:
    """The winners of a run, at most one a prompt, the same on every rank."""

    def __init__(self, margin: float, most_tokens: int = MOST_TOKENS):
        self.margin, self.most_tokens, self.tokens = margin, most_tokens, 0
        self.winners: dict[int, Winner] = {}  # prompt's id -> its winner, the oldest first

    def stand_in(
        self, rollout: Rollout, scores: Scores, places: list[int], world: World
    ) -> tuple[Rollout, Scores, dict[str, float]]:
        """Return the rollout and its scores with stored winners in them, and the metric; then keep the new winners.

        A winner enters where its reward is above all of the group's by more than the margin. Every rank must call this.
        """
        stored = [self.winners.get(prompt.id) for prompt in rollout.prompts]
        best = scores.rewards.amax(1) if len(stored) else scores.rewards.new_zeros(0)
        theirs = torch.tensor([-torch.inf if w is None else w.reward for w in stored], dtype=best.dtype)
        better = preferences(torch.stack([theirs, best], 1), self.margin)[:, 0, 1].tolist()
        chosen = {g: w for g, w in enumerate(stored) if better[g] and g not in scores.skipped}
        joined, rewards = with_winners(rollout, scores.rewards, chosen)
        self._keep(rollout, scores, places, world)
        share = world.sum(len(chosen)) / max(1, world.sum(len(stored)))
        return joined, replace(scores, rewards=rewards), {"stored_winners": share}

    def _keep(self, rollout: Rollout, scores: Scores, places: list[int], world: World) -> None:
        """Keep every group's best response that beats a reward of 0, unless the stored one is better."""
        mine, best = [], scores.rewards.sort(dim=1, descending=True, stable=True).indices[:, :1]
        for g, (i,) in enumerate(best.tolist()):
            reward, n = float(scores.rewards[g, i]), int(rollout.lengths[g, i])
            if reward > self.margin + TOLERANCE:
                tokens, logprobs = (x[g, i, :n].cpu().clone() for x in (rollout.tokens, rollout.logprobs))
                mine.append((places[g], rollout.prompts[g].id, Winner(tokens.int(), logprobs, reward)))
        for _, prompt, winner in sorted((w for part in world.gather(mine) for w in part), key=lambda w: w[0]):
            before = self.winners.get(prompt)
            if before is None or winner.reward >= before.reward:
                self._add(prompt, winner)

    def _add(self, prompt: int, winner: Winner) -> None:
        self._forget(prompt)
        self.winners[prompt] = winner
        self.tokens += len(winner.tokens)
        while self.tokens > self.most_tokens:
            self._forget(next(iter(self.winners)))

    def _forget(self, prompt: int) -> None:
        before = self.winners.pop(prompt, None)
        self.tokens -= 0 if before is None else len(before.tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps; nothing where there is no winner yet."""
        found = list(self.winners.values())
        if not found:
            return {}
        return {
            "prompts": torch.tensor([*self.winners]),
            "lengths": torch.tensor([len(w.tokens) for w in found]),
            "rewards": torch.tensor([w.reward for w in found], dtype=torch.float64),
            "tokens": torch.cat([w.tokens for w in found]),
            "logprobs": torch.cat([w.logprobs for w in found]),
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on with what `tensors()` returned."""
        if tensors:
            sizes = tensors["lengths"].tolist()
            parts = zip(tensors["tokens"].split(sizes), tensors["logprobs"].split(sizes), strict=True)
            rows = zip(tensors["prompts"].tolist(), parts, tensors["rewards"].tolist(), strict=True)
            for prompt, (tokens, logprobs), reward in rows:
                self._add(prompt, Winner(tokens.clone(), logprobs.clone(), reward))


def with_winners(rollout: Rollout, rewards: Tensor, chosen: dict[int, Winner]) -> tuple[Rollout, Tensor]:
    """Put winners {group: winner} in the place of their groups' last responses; rewards [G, N]."""
    if not chosen:
        return rollout, rewards
    more = max(0, max(len(w.tokens) for w in chosen.values()) - rollout.tokens.shape[2])
    tokens, logprobs, entropy = (pad(x, (0, more)) for x in (rollout.tokens, rollout.logprobs, rollout.entropy))
    fixed = (rollout.lengths, rollout.finished, rollout.sampled, rollout.replaced)
    lengths, finished, sampled, replaced = (x.clone() for x in fixed)
    tokens, logprobs, entropy, rewards = (x.clone() for x in (tokens, logprobs, entropy, rewards))
    texts = [[*group] for group in rollout.texts]
    for g, winner in chosen.items():
        n = len(winner.tokens)
        replaced[g, -1] = lengths[g, -1]
        for x, values in ((tokens, winner.tokens), (logprobs, winner.logprobs), (entropy, 0.0)):
            x[g, -1] = 0
            x[g, -1, :n] = values.to(x) if isinstance(values, Tensor) else values
        lengths[g, -1], finished[g, -1], sampled[g, -1], texts[g][-1] = n, True, False, ""
        rewards[g, -1] = winner.reward
    joined = replace(
        rollout,
        tokens=tokens,
        lengths=lengths,
        logprobs=logprobs,
        entropy=entropy,
        finished=finished,
        texts=texts,
        sampled=sampled,
        replaced=replaced,
    )
    return joined, rewards

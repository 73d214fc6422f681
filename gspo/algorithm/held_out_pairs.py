"""Keep the held-out responses of a round's beginning, and measure how the policy orders their pairs.

The pairs of a training batch are what the policy still disagrees with itself about: the better it gets, the harder they
are. These stay the same for a round, so their order says how far the policy has come since it began.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo.algorithm.gold_solutions import add_solution_rewards, prefer_solutions
from gspo.algorithm.objective import find_algorithm, pair_accuracy, relative_ranking_terms
from gspo.algorithm.pairs import forks, preferences
from gspo.algorithm.self_play_models import SelfPlayModels
from gspo.types import Groups, Prompt, Rollout

STEPS_BETWEEN = 5  # a measurement is a forward over no more responses than so many steps sample and train on


@dataclass(frozen=True)
class HeldOutPairs:
    """Responses to the P held-out prompts, on the CPU of every rank. K is N, or N + 1 with gold solutions (SPIN)."""

    prompts: Sequence[Prompt]
    tokens: Tensor  # [P, K, L] int64
    lengths: Tensor  # [P, K] int64
    anchors: Tensor  # [P, K, L] float32, log-probs that the objective subtracts
    rewards: Tensor  # [P, N]

    @classmethod
    def keep(
        cls, prompts: Sequence[Prompt], places: list[int], rollout: Rollout, rewards: Tensor, models: SelfPlayModels
    ) -> "HeldOutPairs":
        """Keep a round's first responses: this rank's rollout of the prompts at `places`, all ranks' rewards [P, N].

        Every rank must call this, when the opponent is about to become a copy of the policy.
        """
        world, anchor = models.world, models.cfg.objective.anchor_model
        if anchor == "none":
            anchors = torch.zeros_like(rollout.logprobs)
        else:  # `old` would be the policy itself, at any time: the opponent takes its place
            anchors = models.logprobs_under(models.frozen["initial"] if anchor == "initial" else models.policy, rollout)
        width = world.max(rollout.tokens.shape[2])
        more = width - rollout.tokens.shape[2]
        wide = [torch.nn.functional.pad(x, (0, more)) for x in (rollout.tokens, anchors)]
        tokens, anchors, lengths = (world.gather_rows(places, x) for x in (*wide, rollout.lengths))
        return cls(prompts, tokens, lengths, anchors, rewards)

    @classmethod
    def read(cls, tensors: dict[str, Tensor], prompts: Sequence[Prompt]) -> "HeldOutPairs | None":
        """Return what `tensors()` gave, for the prompts there are now; None where it has none of them."""
        both = min(len(tensors.get("rewards", ())), len(prompts))  # the first ones are the same
        kept = {name: x[:both] for name, x in tensors.items()}
        return cls([prompts[p] for p in range(both)], **kept) if both else None

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {name: getattr(self, name).contiguous() for name in ("tokens", "lengths", "anchors", "rewards")}

    def steps_between(self, batch: int) -> int:
        """Return the number of steps from one measurement to the next, for batches of so many prompts."""
        return STEPS_BETWEEN * -(-len(self.prompts) // batch)

    def measure(self, models: SelfPlayModels) -> dict[str, float]:
        """Return the metrics of the policy on these pairs; nothing where there are none. Every rank must call this."""
        world, cfg = models.world, models.cfg.objective
        rollout, rewards, anchors = self._of_rank(world.places(len(self.prompts)), world.device)
        beats = prefer_solutions(preferences(rewards, cfg.margin), rollout.sampled)
        groups = Groups(anchors, rewards, beats, forks(rollout.tokens, rollout.lengths), rollout.lengths)
        algorithm = find_algorithm(cfg.algorithm)
        pairs = algorithm.pairs(groups)
        gap = algorithm.gaps(models.logprobs_under(models.policy, rollout).double(), groups, cfg)
        terms = relative_ranking_terms(gap, pairs)
        mine = (pair_accuracy(gap, pairs), float(gap[pairs].sum()), int(pairs.sum()), float(terms.sum()), len(terms))
        right, margin, count, ranking, winners = (sum(parts) for parts in zip(*world.gather(mine), strict=True))
        if not count:
            return {}
        found = {"preference_accuracy": right / count, "ranking_loss": ranking / winners}
        return found | {"heldout/gap_mean": margin / count, "heldout/pairs": float(count)}

    def _of_rank(self, places: list[int], device: torch.device) -> tuple[Rollout, Tensor, Tensor]:
        """Return the rollout of some of the prompts, its rewards [G, K] and its anchors [G, K, L]."""
        tokens, lengths, anchors, rewards = (
            x[places].to(device) for x in (self.tokens, self.lengths, self.anchors, self.rewards)
        )
        responses = tokens.shape[1]
        sampled = (torch.arange(responses, device=device) < rewards.shape[1]).expand(len(places), -1)
        nothing = torch.zeros_like(anchors)
        texts = [[""] * responses for _ in places]
        prompts = [self.prompts[p] for p in places]
        rollout = Rollout(prompts, tokens, lengths, nothing, nothing, torch.ones_like(sampled), texts, sampled)
        return rollout, add_solution_rewards(rewards, rollout), anchors

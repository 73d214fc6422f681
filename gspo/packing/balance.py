"""Move scored groups between ranks, so that all ranks train on about equally many tokens.

Responses differ in length: a rank that trained on the groups it sampled could have twice the tokens of another, and all
would wait for it at every optimizer step.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gspo.distributed.world import World
from gspo.packing.micro_batches import assign, group_tokens, imbalance
from gspo.types import Collected, Rollout, Scores


def balance(
    places: list[int], rollout: Rollout, scores: Scores, minibatches: int, world: World
) -> tuple[list[int], Rollout, Scores, float]:
    """Exchange the groups this rank sampled for those it trains on, in the order of their places; also -> `imbalance`.

    Which group goes where follows from the lengths alone and is the same on every rank. The counters of `scores`
    (calls, faults) stay on the rank that made the calls. Every rank must call this.
    """
    if world.size == 1:
        return places, rollout, scores, 1.0
    shares = world.gather(list(zip(places, group_tokens(rollout), strict=True)))
    tokens = [count for _, count in sorted(pair for share in shares for pair in share)]
    owners = assign(tokens, minibatches, world.size)
    device, rollout = rollout.tokens.device, _on_cpu(rollout)

    def parcel(rank: int) -> Collected | None:
        groups = [g for g, place in enumerate(places) if owners[place] == rank]
        if not groups and rank != world.rank:
            return None
        return [places[g] for g in groups], rollout.select(groups), _select(scores, groups)

    arrived = [p for p in world.all_to_all([parcel(rank) for rank in range(world.size)]) if p is not None]
    found = [place for part, _, _ in arrived for place in part]
    order = sorted(range(len(found)), key=lambda g: found[g])
    mine = _join_rollouts([part for _, part, _ in arrived], order, device)
    share = imbalance(tokens, owners, minibatches, world.size)
    return sorted(found), mine, _join_scores([part for _, _, part in arrived], order, scores), share


def _on_cpu(r: Rollout) -> Rollout:
    names = ("tokens", "lengths", "logprobs", "entropy", "finished", "sampled", "copied", "prefilled")
    return replace(r, **{name: getattr(r, name).cpu() for name in names})


def _select(scores: Scores, groups: list[int]) -> Scores:
    return Scores(
        scores.rewards[groups],
        {name: values[groups] for name, values in scores.parts.items()},
        [scores.predictions[g] for g in groups],
        [k for k, g in enumerate(groups) if g in scores.skipped],
    )


def _join_rollouts(parts: list[Rollout], order: list[int], device: torch.device) -> Rollout:
    width = max(part.tokens.shape[2] for part in parts)

    def rows(name: str) -> Tensor:
        found = [getattr(part, name) for part in parts]
        if found[0].ndim == 3:
            found = [torch.nn.functional.pad(x, (0, width - x.shape[2])) for x in found]
        return torch.cat(found)[order].to(device)

    prompts, texts = ([x for part in parts for x in getattr(part, name)] for name in ("prompts", "texts"))
    return Rollout(
        [prompts[g] for g in order],
        rows("tokens"),
        rows("lengths"),
        rows("logprobs"),
        rows("entropy"),
        rows("finished"),
        [texts[g] for g in order],
        rows("sampled"),
        rows("copied"),
        rows("prefilled"),
    )


def _join_scores(parts: list[Scores], order: list[int], counted: Scores) -> Scores:
    """The rows of `parts`, and the counters of `counted`."""

    def rows(name: str) -> Tensor:  # a response that did not report a number has none, nor has a rank without one
        found = [part.parts.get(name, torch.full_like(part.rewards, torch.nan)) for part in parts]
        return torch.cat(found)[order]

    predictions = [x for part in parts for x in part.predictions]
    skipped = [g in part.skipped for part in parts for g in range(len(part.rewards))]
    return replace(
        counted,
        rewards=torch.cat([part.rewards for part in parts])[order],
        parts={name: rows(name) for name in sorted({name for part in parts for name in part.parts})},
        predictions=[predictions[g] for g in order],
        skipped=[k for k, g in enumerate(order) if skipped[g]],
        faulty=None,
    )

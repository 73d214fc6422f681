"""Responses that were not sampled: the rows' gold solutions, as a last member of each group (for SPIN)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gspo.algorithm.pairs import forks
from gspo.algorithm.selves import Selves
from gspo.errors import UserError
from gspo.models.architecture import check_length
from gspo.types import Experience, Prompt, Rollout


def solution_ids(prompt: Prompt, tokenizer: Any, end_id: int) -> list[int]:
    """Tokens of the row's `solution`, the end of sequence included; UserError where the row has none."""
    text = prompt.extra_info.get("solution")
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"objective.algorithm=spin learns from gold texts: the row of {prompt.text[:60]!r} has no field 'solution'."
        )
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], end_id]


def solutions(prompts: list[Prompt], like: Rollout, tokenizer: Any, end_id: int) -> Rollout:
    """A Rollout [G, 1, L] of the gold solutions; its sampler's log-probs are zeros, for there was no sampler."""
    ids = [solution_ids(p, tokenizer, end_id) for p in prompts]
    device = like.tokens.device
    tokens = torch.zeros(len(ids), 1, max(map(len, ids), default=0), dtype=torch.long, device=device)
    for g, answer in enumerate(ids):
        tokens[g, 0, : len(answer)] = torch.tensor(answer, device=device)
    lengths = torch.tensor([[len(answer)] for answer in ids], dtype=torch.long, device=device).view(-1, 1)
    nothing = torch.zeros(tokens.shape, device=device)
    texts = [[p.extra_info["solution"]] for p in prompts]
    return Rollout(prompts, tokens, lengths, nothing, nothing, torch.ones_like(lengths, dtype=torch.bool), texts)


def with_solutions(exp: Experience, tokenizer: Any, end_id: int, selves: Selves) -> Experience:
    """The same groups, the gold solution last and preferred to all of them. Every rank must call this."""
    gold = solutions(exp.rollout.prompts, exp.rollout, tokenizer, end_id)
    check_length(selves.policy.config, selves.world.max(gold.longest))
    reference, anchors = selves.reference(gold)
    g, n = exp.rewards.shape
    beats = torch.zeros(g, n + 1, n + 1, dtype=torch.bool, device=exp.beats.device)
    beats[:, n, :n] = True
    rollout = _join(exp.rollout, gold)
    return replace(
        exp,
        rollout=rollout,
        rewards=torch.cat([exp.rewards, torch.ones_like(exp.rewards[:, :1])], 1),
        beats=beats,
        forks=forks(rollout.tokens, rollout.lengths),
        reference_logprobs=_beside(exp.reference_logprobs, reference),
        anchors=_beside(exp.anchors, anchors),
        batch_pairs=exp.batch_groups * n,
        given=1,
    )


def _join(a: Rollout, b: Rollout) -> Rollout:
    return Rollout(
        a.prompts,
        _beside(a.tokens, b.tokens),
        torch.cat([a.lengths, b.lengths], 1),
        _beside(a.logprobs, b.logprobs),
        _beside(a.entropy, b.entropy),
        torch.cat([a.finished, b.finished], 1),
        [[*x, *y] for x, y in zip(a.texts, b.texts, strict=True)],
    )


def _beside(a: Tensor, b: Tensor) -> Tensor:
    """[G, N, L] and [G, M, K] -> [G, N + M, max(L, K)], zeros to the right."""
    width = max(a.shape[-1], b.shape[-1])
    return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (a, b)], 1)

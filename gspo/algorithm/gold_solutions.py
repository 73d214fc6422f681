"""SPIN: add each row's gold solution to its group as one more response, preferred to all others.

The solution was not sampled (`Rollout.sampled`): the objective learns from it, and neither the KL term, the weights of
off-policy steps nor the metrics count it.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.models.attention_support import check_length
from gspo.types import Prompt, Rollout

SOLUTION_REWARD = 1.0  # a gold solution's


def solution_ids(prompt: Prompt, tokenizer: Any, end_id: int) -> list[int]:
    """Return the tokens of the row's `solution`, the end of sequence included; UserError where the row has none."""
    text = prompt.extra_info.get("solution")
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"objective.algorithm=spin learns from gold texts: the row of {prompt.text[:60]!r} has no field 'solution'."
        )
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], end_id]


def add_solutions(rollout: Rollout, tokenizer: Any, end_id: int, model_config: Any, world: World) -> Rollout:
    """Return the rollout [G, N + 1, L] with each row's gold solution last. Every rank must call this.

    UserError where a row has no solution, or the model cannot take the longest one.
    """
    ids = [solution_ids(prompt, tokenizer, end_id) for prompt in rollout.prompts]
    tokens, device = rollout.tokens, rollout.tokens.device
    sizes = torch.tensor([[len(solution)] for solution in ids], dtype=torch.long, device=device).view(-1, 1)
    more = max(0, max(map(len, ids), default=0) - tokens.shape[2])
    grown = [pad(x, (0, more, 0, 1)) for x in (tokens, rollout.logprobs, rollout.entropy)]  # zeros: no sampler
    for g, solution in enumerate(ids):
        grown[0][g, -1, : len(solution)] = torch.tensor(solution, device=device)
    joined = replace(
        rollout,
        tokens=grown[0],
        lengths=torch.cat([rollout.lengths, sizes], 1),
        logprobs=grown[1],
        entropy=grown[2],
        finished=pad(rollout.finished, (0, 1), value=True),
        texts=[[*texts, p.extra_info["solution"]] for texts, p in zip(rollout.texts, rollout.prompts, strict=True)],
        sampled=pad(rollout.sampled, (0, 1), value=False),
        copied=pad(rollout.copied, (0, 1)),
    )
    longest = (len(p.ids) + len(solution) for p, solution in zip(rollout.prompts, ids, strict=True))
    check_length(model_config, world.max(max(longest, default=0)))
    return joined


def add_solution_rewards(rewards: Tensor, rollout: Rollout) -> Tensor:
    """Rewards [G, N] of the sampled responses -> [G, N or N + 1], a full one for the solution where there is one."""
    return pad(rewards, (0, rollout.sampled.shape[1] - rewards.shape[1]), value=SOLUTION_REWARD)


def prefer_solutions(beats: Tensor, sampled: Tensor) -> Tensor:
    """Let solutions beat all sampled responses, whatever these score: beats [G, N, N], sampled [G, N]."""
    return beats | (~sampled[:, :, None] & sampled[:, None, :])

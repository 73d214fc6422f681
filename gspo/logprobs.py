"""Log-probabilities of sampled responses under a model: the one home of the token shift and of the temperature.

A row is `[left padding | prompt | response | right padding]`, so that all responses of a batch begin in the same
column; position restarts are none and the model's own head is used, so every architecture is served exactly.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from gspo.batching import Row, take_rows
from gspo.types import Prompt, Rollout

Autocast = Callable[[], AbstractContextManager]


def pad_rows(prompts: list[Prompt], tokens: Tensor, lengths: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """prompts (one a row), tokens [R, L], lengths [R] -> input ids [R, P + L], attention mask [R, P + L]."""
    width = max(len(p.ids) for p in prompts)
    left = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for i, p in enumerate(prompts):
        left[i, width - len(p.ids) :] = torch.tensor(p.ids)
        mask[i, width - len(p.ids) :] = 1
    right = (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]).long()
    ids = torch.cat([left.to(tokens.device), tokens], 1)
    return ids, torch.cat([mask.to(tokens.device), right], 1)


def response_logprobs(
    model: nn.Module, prompts: list[Prompt], tokens: Tensor, lengths: Tensor, temperature: float, pad_id: int
) -> Tensor:
    """log pi_T(y_t | x, y_<t) of every response token, where pi_T = softmax(logits / T).

    prompts: one a row (R of them), tokens [R, L], lengths [R] -> log-probs [R, L] float32, zero in the padding.
    """
    ids, mask = pad_rows(prompts, tokens, lengths, pad_id)
    width = tokens.shape[1]
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits[:, :-1]
    logits = logits.float() / temperature
    logprobs = logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)
    real = torch.arange(width, device=tokens.device) < lengths[:, None]
    return torch.where(real, logprobs, 0.0)


@torch.no_grad()
def rollout_logprobs(
    model: nn.Module,
    rollout: Rollout,
    parts: list[list[Row]],
    count: int,
    temperature: float,
    pad_id: int,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Log-probs [G, N, L] of a whole rollout, micro-batch by micro-batch.

    `count` is the number of forwards to run, at least len(parts): ranks of one sharded model must run equally many.
    """
    out = torch.zeros_like(rollout.logprobs)
    for k in range(count):
        with autocast():
            if k >= len(parts):
                idle_forward(model, temperature, pad_id, out.device)
                continue
            prompts, tokens, lengths = take_rows(rollout, parts[k])
            logprobs = response_logprobs(model, prompts, tokens, lengths, temperature, pad_id)
        g, i = zip(*parts[k], strict=True)
        out[list(g), list(i), : logprobs.shape[1]] = logprobs
    return out


def idle_forward(model: nn.Module, temperature: float, pad_id: int, device: torch.device) -> Tensor:
    """A forward over one token, for a rank that is out of work while others are not. Returns its [1, 1] log-prob."""
    nobody = Prompt(0, (pad_id,), "", "", "")
    token = torch.full((1, 1), pad_id, device=device)
    return response_logprobs(
        model, [nobody], token, torch.ones(1, dtype=torch.long, device=device), temperature, pad_id
    )

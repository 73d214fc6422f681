"""Log-probabilities of sampled responses under a model: the one home of the token shift and of the temperature.

Rows are packed (see packing.py) and scored by the model's own head, so its soft caps and logit scales hold.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from gspo.attention import PACKED, attention_of, check_architecture, refusal
from gspo.batching import Row
from gspo.packing import PackedBatch, pack, pack_rows
from gspo.types import Prompt, Rollout

Autocast = Callable[[], AbstractContextManager]
NOBODY = Prompt(0, (0,), "", "", "")


def response_logits(model: nn.Module, packed: PackedBatch) -> Tensor:
    """[M, V]: what each response token was chosen from; the last prompt token scores the first of every response."""
    with attention_of(model.config.get_text_config(), PACKED):
        logits = model(
            input_ids=packed.ids,
            position_ids=packed.positions,
            use_cache=False,
            logits_to_keep=packed.scored_by,
            pack=packed,
        ).logits[0]
    return logits if len(logits) == len(packed.targets) else logits[packed.scored_by]  # not every class takes indices


def response_logprobs(model: nn.Module, packed: PackedBatch, temperature: float) -> Tensor:
    """log pi_T(y_t | x, y_<t) of every response token, where pi_T = softmax(logits / T).

    -> log-probs [R, L] float32, zero in the padding.
    """
    logits = response_logits(model, packed).float() / temperature
    logprobs = logits.gather(-1, packed.targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return logprobs.new_zeros(packed.mask.shape).masked_scatter(packed.mask, logprobs)


@torch.no_grad()
def rollout_logprobs(
    model: nn.Module,
    rollout: Rollout,
    parts: list[list[Row]],
    count: int,
    temperature: float,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Log-probs [G, N, L] of a whole rollout, micro-batch by micro-batch.

    `count` is the number of forwards to run, at least len(parts): ranks of one sharded model must run equally many.
    """
    out = torch.zeros_like(rollout.logprobs)
    for k in range(count):
        with autocast():
            if k >= len(parts):
                idle_forward(model, out.device)
                continue
            logprobs = response_logprobs(model, pack_rows(rollout, parts[k]), temperature)
        g, i = zip(*parts[k], strict=True)
        out[list(g), list(i), : logprobs.shape[1]] = logprobs
    return out


def idle_forward(model: nn.Module, device: torch.device) -> Tensor:
    """A forward over two tokens, for a rank that is out of work while others are not. Returns its [1, 1] log-prob."""
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    return response_logprobs(model, pack([NOBODY], [0], token, token[0] + 1), 1.0)


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """UserError unless a small pack has the logits of its sequences one by one; for a model before it is sharded.

    Sees what no configuration says: state that leaks from one response to the next, positions taken from the index.
    """
    check_architecture(model.config)
    device = next(model.parameters()).device
    prompts = [Prompt(0, (3, 1, 4), "", "", ""), Prompt(1, (1,), "", "", "")]
    owners, tokens = [0, 0, 1], torch.tensor([[1, 5, 9], [2, 6, 0], [5, 3, 5]], device=device)
    lengths = torch.tensor([3, 2, 3])
    try:
        mine = response_logits(model, pack(prompts, owners, tokens, lengths)).float()
    except (TypeError, KeyError) as e:
        raise refusal(model.config, f"cannot run packed rows ({type(e).__name__}: {e})") from e
    plain = []
    for owner, row, n in zip(owners, tokens.tolist(), lengths.tolist(), strict=True):
        ids = torch.tensor([[*prompts[owner].ids, *row[:n]]], device=device)
        plain.append(model(input_ids=ids, use_cache=False).logits[0, -n - 1 : -1].float())
    plain = torch.cat(plain)
    if (mine - plain).abs().max() > 1e-3 * (plain - plain.mean(-1, keepdim=True)).abs().max():
        raise refusal(model.config, "does not keep the tokens of a pack apart")

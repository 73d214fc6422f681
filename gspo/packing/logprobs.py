"""Log-probabilities of sampled responses under a model: the one home of the token shift and of the temperature.

Rows are packed (see pack.py). Where `linear_logprob` can stand for the model's head (see head.py), no [M, V]
logits are held; elsewhere they are the model's own.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gspo.distributed.sharding import run_as_forward
from gspo.kernels.ops import linear_logprob, linear_logprob_and_grad
from gspo.models.architecture import attention_implementation, check_architecture, ordinary_token, unsupported_model
from gspo.packing.attention import PACKED
from gspo.packing.head import Head
from gspo.packing.micro_batches import Row
from gspo.packing.pack import PackedBatch, pack, pack_rows
from gspo.types import Prompt, Rollout

Autocast = Callable[[], AbstractContextManager]
Slope = Callable[[Tensor, slice | Tensor], Tensor]
FINE, ROUGH = 3e-4, 3e-2  # how far a pack's log-probs may be off, of the logits' spread; in half precision
NOBODY = Prompt(0, (0,), "", "", "")


def response_logprobs(model: nn.Module, head: Head | None, packed: PackedBatch, temperature: float) -> Tensor:
    """log pi_T(y_t | x, y_<t) of every response token, where pi_T = softmax(logits / T).

    The last prompt token scores the first token of every response. -> log-probs [R, L] float32, zero in the padding.
    """
    if head is None:
        logprobs = _from_logits(model, packed, temperature)
    else:
        logprobs = run_as_forward(model, _from_hidden, head, packed, temperature)
    if packed.twins is not None:
        logprobs = logprobs.index_select(0, packed.twins)
    return logprobs.new_zeros(packed.mask.shape).masked_scatter(packed.mask, logprobs)


def surrogate(model: nn.Module, head: Head | None, packed: PackedBatch, temperature: float, slope: Slope) -> Tensor:
    """sum slope * log-prob over the response tokens, a scalar whose gradient is the loss's, for a loss that is a sum
    over tokens: `slope(logprob [P], tokens)` is its dL/dlogprob [P] at the response tokens `tokens` (of M).

    Where no logits are held it costs a quarter less in the head than `response_logprobs` and a backward. One backward.
    """
    if packed.twins is not None:
        slope = _summed(slope, packed.twins)
    if head is None:
        logprobs = _from_logits(model, packed, temperature)
        return (slope(logprobs.detach(), slice(0, len(logprobs))) * logprobs).sum()
    return run_as_forward(model, _from_hidden, head, packed, temperature, slope)


def _summed(slope: Slope, twins: Tensor) -> Slope:
    """A slope at the D tokens of a pack, from one at the M tokens of its responses: the sum over a token's twins."""
    order, last = twins.argsort(stable=True), twins.bincount().cumsum(0).tolist()

    def summed(logprob: Tensor, held: slice) -> Tensor:
        first = last[held.start - 1] if held.start else 0
        tokens = order[first : last[held.stop - 1]]
        which = twins[tokens] - held.start
        return torch.zeros_like(logprob).index_add(0, which, slope(logprob.index_select(0, which), tokens))

    return summed


def _from_hidden(
    model: nn.Module, head: Head, packed: PackedBatch, temperature: float, slope: Slope | None = None
) -> Tensor:
    """[D] log-probs, or with a slope the surrogate; of the [D, V] logits no more than a chunk is held."""
    with attention_implementation(model.config.get_text_config(), PACKED):
        hidden = model.base_model(**_inputs(packed)).last_hidden_state[0]
    scored = hidden.index_select(0, packed.scored_by)
    return run_as_forward(model.get_output_embeddings(), _by_head, scored, packed.targets, head, temperature, slope)


def _by_head(
    layer: nn.Linear, hidden: Tensor, targets: Tensor, head: Head, temperature: float, slope: Slope | None
) -> Tensor:
    where = hidden, layer.weight, targets
    shape = {"bias": layer.bias, "scale": head.scale, "softcap": head.softcap, "temperature": temperature}
    return linear_logprob(*where, **shape) if slope is None else linear_logprob_and_grad(*where, slope, **shape)[0]


def _from_logits(model: nn.Module, packed: PackedBatch, temperature: float) -> Tensor:
    """[D] log-probs, by the model's own head."""
    with attention_implementation(model.config.get_text_config(), PACKED):
        logits = model(**_inputs(packed), logits_to_keep=packed.scored_by).logits[0]
    if len(logits) != len(packed.targets):  # not every class takes indices
        logits = logits[packed.scored_by]
    logits = logits.float() / temperature
    return logits.gather(-1, packed.targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _inputs(packed: PackedBatch) -> dict[str, Any]:
    return {"input_ids": packed.ids, "position_ids": packed.positions, "use_cache": False, "pack": packed}


@torch.no_grad()
def rollout_logprobs(
    model: nn.Module,
    head: Head | None,
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
                idle_forward(model, head, out.device)
                continue
            logprobs = response_logprobs(model, head, pack_rows(rollout, parts[k]), temperature)
        g, i = zip(*parts[k], strict=True)
        out[list(g), list(i), : logprobs.shape[1]] = logprobs
    return out


def idle_forward(model: nn.Module, head: Head | None, device: torch.device) -> Tensor:
    """A forward over two tokens, for a rank that is out of work while others are not. Returns its [1, 1] log-prob."""
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    return response_logprobs(model, head, pack([NOBODY], [0], token, token[0] + 1), 1.0)


@torch.no_grad()
def check_packing(model: nn.Module, head: Head | None, device: torch.device | None = None) -> None:
    """UserError unless a small pack has the log-probs of its sequences one by one, on `device` (None: the weights').

    Sees what no configuration says: state that leaks from one response to the next, positions taken from the index.
    All ranks of a sharded model call this together.
    """
    check_architecture(model.config)
    device = next(model.parameters()).device if device is None else device
    first = ordinary_token(model.config)
    prompts = [Prompt(0, (first + 3, first + 1, first + 4), "", "", ""), Prompt(1, (first + 1,), "", "", "")]
    owners, tokens = [0, 0, 1], first + torch.tensor([[1, 5, 9], [1, 6, 0], [5, 3, 5]], device=device)
    lengths = torch.tensor([3, 2, 3])  # the first two share a token
    try:
        mine = response_logprobs(model, head, pack(prompts, owners, tokens, lengths), 1.0)
    except (TypeError, KeyError) as e:
        raise unsupported_model(model.config, f"cannot run packed rows ({type(e).__name__}: {e})") from e
    error, spread, rough = 0.0, 0.0, False
    for r, (owner, n) in enumerate(zip(owners, lengths.tolist(), strict=True)):
        response = tokens[r, :n]
        ids = torch.tensor([[*prompts[owner].ids, *response.tolist()]], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, -n - 1 : -1]
        rough, logits = logits.dtype != torch.float32, logits.float()
        plain = logits.log_softmax(-1).gather(-1, response[:, None]).squeeze(-1)
        error = max(error, float((mine[r, :n] - plain).abs().max()))
        spread = max(spread, float((logits - logits.mean(-1, keepdim=True)).abs().max()))
    if error > (ROUGH if rough else FINE) * spread:
        raise unsupported_model(model.config, "does not keep the tokens of a pack apart")

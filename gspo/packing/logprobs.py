"""Compute log-probabilities of responses under a model: the only place of the token shift and of the temperature.

Responses are packed (pack.py). `head` is what probe_head.py found: with it no [M, V] logits are held; where it is
None they are the model's own.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gspo.distributed.sharding import run_as_forward
from gspo.errors import UserError
from gspo.kernels.ops import linear_logprob, linear_logprob_and_grad
from gspo.models.attention_support import (
    attention_implementation,
    check_architecture,
    ordinary_token,
    plain_attention,
    short_windows,
    unsupported_model,
)
from gspo.packing.micro_batches import Row
from gspo.packing.pack import PackedBatch, pack, pack_rows
from gspo.packing.packed_attention import PACKED
from gspo.packing.probe_head import Head
from gspo.types import Prompt, Rollout

Autocast = Callable[[], AbstractContextManager]
Slope = Callable[[Tensor, slice | Tensor], Tensor]  # see `surrogate`
TOLERANCE, HALF_TOLERANCE = 3e-4, 3e-2  # error of log-probs / spread of logits, fp32 and half precision
IDLE_PROMPT = Prompt(0, (0,), "", "", "")


def response_logprobs(model: nn.Module, head: Head | None, packed: PackedBatch, temperature: float) -> Tensor:
    """Compute log pi_T(y_t | x, y_<t) of every response token, where pi_T = softmax(logits / T).

    The last prompt token scores the first token of every response. -> log-probs [R, L] float32, zero in the padding.
    """
    if head is None:
        logprobs = _from_logits(model, packed, temperature)
    else:
        logprobs = run_as_forward(model, _from_hidden, head, packed, temperature)
    if packed.token_of_response is not None:
        logprobs = logprobs.index_select(0, packed.token_of_response)
    return logprobs.new_zeros(packed.mask.shape).masked_scatter(packed.mask, logprobs)


def response_hidden(model: nn.Module, packed: PackedBatch) -> Tensor:
    """Compute the last hidden state before each of the D response tokens of a pack, [D, H]."""
    return run_as_forward(model, _hidden_before, packed)


def _hidden_before(model: nn.Module, packed: PackedBatch) -> Tensor:
    with attention_implementation(model.config.get_text_config(), PACKED):
        hidden = model.base_model(**_inputs(packed)).last_hidden_state[0]
    return hidden.index_select(0, packed.scored_by)


def surrogate(model: nn.Module, head: Head | None, packed: PackedBatch, temperature: float, slope: Slope) -> Tensor:
    """Compute sum slope * log-prob over the response tokens, a scalar with the gradient of the loss.

    For a loss that is a sum over tokens: `slope(logprob [P], tokens)` returns its dL/dlogprob [P] at the response
    tokens `tokens` (of M). With a head it costs a quarter less there than `response_logprobs` and a backward pass. Only
    one backward pass is possible.
    """
    if packed.token_of_response is not None:
        slope = _sum_over_shared(slope, packed.token_of_response)
    if head is None:
        logprobs = _from_logits(model, packed, temperature)
        return (slope(logprobs.detach(), slice(0, len(logprobs))) * logprobs).sum()
    return run_as_forward(model, _from_hidden, head, packed, temperature, slope)


def _sum_over_shared(slope: Slope, token_of_response: Tensor) -> Slope:
    """Turn a slope at the M tokens of the responses into one at the D tokens of their pack: a token's is the sum over
    the responses that share it."""
    order, last = token_of_response.argsort(stable=True), token_of_response.bincount().cumsum(0).tolist()

    def summed(logprob: Tensor, packed: slice) -> Tensor:
        first = last[packed.start - 1] if packed.start else 0
        tokens = order[first : last[packed.stop - 1]]
        which = token_of_response[tokens] - packed.start
        return torch.zeros_like(logprob).index_add(0, which, slope(logprob.index_select(0, which), tokens))

    return summed


def _from_hidden(
    model: nn.Module, head: Head, packed: PackedBatch, temperature: float, slope: Slope | None = None
) -> Tensor:
    """Compute log-probs [D], or with a slope the surrogate; of the [D, V] logits no more than a chunk is held."""
    scored = _hidden_before(model, packed)
    return run_as_forward(model.get_output_embeddings(), _by_head, scored, packed.targets, head, temperature, slope)


def _by_head(
    layer: nn.Linear, hidden: Tensor, targets: Tensor, head: Head, temperature: float, slope: Slope | None
) -> Tensor:
    where = hidden, layer.weight, targets
    shape = {"bias": layer.bias, "scale": head.scale, "softcap": head.softcap, "temperature": temperature}
    return linear_logprob(*where, **shape) if slope is None else linear_logprob_and_grad(*where, slope, **shape)[0]


def _from_logits(model: nn.Module, packed: PackedBatch, temperature: float) -> Tensor:
    """Compute log-probs [D] from the model's own logits."""
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
    """Compute log-probs [G, N, L] of a whole rollout, one micro-batch of `parts` after the other.

    `count` >= len(parts) is the number of forwards to run: ranks of one sharded model must run equally many.
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
    """Run a forward over two tokens, for a rank without work while others have some -> its log-prob [1, 1]."""
    return response_logprobs(model, head, idle_pack(device), 1.0)


def idle_pack(device: torch.device) -> PackedBatch:
    """Pack a prompt and a response of one token each."""
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    return pack([IDLE_PROMPT], [0], token, token[0] + 1)


@torch.no_grad()
def check_packing(model: nn.Module, head: Head | None, device: torch.device | None = None) -> None:
    """Raise UserError unless a small pack has the log-probs of its sequences one by one.

    Runs on `device` (None: the weights'). It finds what no configuration says: state that leaks from one response to
    the next, or positions that are taken from the index in the pack. All ranks of a sharded model must call it
    together.
    """
    check_architecture(model.config)
    device = next(model.parameters()).device if device is None else device
    first = ordinary_token(model.config)
    prompts = [Prompt(0, (first + 3, first + 1, first + 4), "", "", ""), Prompt(1, (first + 1,), "", "", "")]
    owners, tokens = [0, 0, 1], first + torch.tensor([[1, 5, 9], [1, 6, 0], [5, 3, 5]], device=device)
    lengths = torch.tensor([3, 2, 3])  # the first two share a token
    with short_windows(model) as window:
        error, spread, half = _packing_error(model, head, prompts, owners, tokens, lengths)
    if error > (HALF_TOLERANCE if half else TOLERANCE) * spread:
        raise unsupported_model(model.config, f"{window}does not keep the tokens of a pack apart")


def _packing_error(
    model: nn.Module, head: Head | None, prompts: list[Prompt], owners: list[int], tokens: Tensor, lengths: Tensor
) -> tuple[float, float, bool]:
    """Return (largest error of a log-prob, spread of the logits, whether they are in half precision)."""
    try:
        mine = response_logprobs(model, head, pack(prompts, owners, tokens, lengths), 1.0)
    except UserError:
        raise
    except (TypeError, KeyError, AttributeError, ValueError, IndexError) as e:
        raise unsupported_model(model.config, f"cannot run packed rows ({type(e).__name__}: {e})") from e
    error, spread, half = 0.0, 0.0, False
    for r, (owner, n) in enumerate(zip(owners, lengths.tolist(), strict=True)):
        response = tokens[r, :n]
        ids = torch.tensor([[*prompts[owner].ids, *response.tolist()]], device=tokens.device)
        with plain_attention(model.config):
            logits = model(input_ids=ids, use_cache=False).logits[0, -n - 1 : -1]
        half, logits = logits.dtype != torch.float32, logits.float()
        plain = logits.log_softmax(-1).gather(-1, response[:, None]).squeeze(-1)
        error = max(error, float((mine[r, :n] - plain).abs().max()))
        spread = max(spread, float((logits - logits.mean(-1, keepdim=True)).abs().max()))
    return error, spread, half

"""Log-probs and gradients of responses as plain transformers has them: one sequence at a time, unpacked."""

import copy

import torch

from gspo.packing.logprobs import response_logprobs
from gspo.packing.pack import pack_rows
from gspo.packing.probe_head import measure_head
from gspo.types import Prompt, Rollout

T, EOS = 0.7, 1


def a_rollout(prompt_sizes, lengths, seed=1):
    """Random tokens; a response of one token is the end of the sequence alone."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    prompts = [Prompt(i, tuple(range(5 + i, 5 + i + size)), "", "", "") for i, size in enumerate(prompt_sizes)]
    tokens = torch.randint(2, 97, (*lengths.shape, int(lengths.max())), generator=g)
    tokens[torch.arange(tokens.shape[-1]) >= lengths[..., None]] = 0
    tokens[lengths == 1] = torch.where(torch.arange(tokens.shape[-1]) == 0, EOS, 0)
    zeros = torch.zeros(tokens.shape)
    return Rollout(prompts, tokens, lengths, zeros, zeros, lengths > 0, [[""] * lengths.shape[1]] * len(lengths))


RAGGED = a_rollout((9, 1, 14), [[3, 12, 1], [8, 1, 2], [1, 1, 5]])
RAGGED.tokens[0, 1, :3] = RAGGED.tokens[0, 0, :3]  # all of one response begins another
RAGGED.tokens[2, 2, 0] = EOS  # ... even an end of sequence
SOME_ROWS = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 1), (2, 2)]  # of the second group one response, of the third two


def one_by_one(model, prompt, tokens, temperature):
    """log softmax(logits / T) of each response token, with no padding and no tricks."""
    ids = torch.tensor([[*prompt.ids, *tokens.tolist()]])
    logits = model(input_ids=ids).logits[0, len(prompt.ids) - 1 : -1] / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(-1, tokens[:, None])[:, 0]


def plain_gradients(model, rollout, rows, weights, logprobs=None):
    """Of the weighted log-probs, response by response; `logprobs` are compared with them on the way."""
    model.zero_grad()
    loss = 0.0
    for r, (g, i) in enumerate(rows):
        n = int(rollout.lengths[g, i])
        expected = one_by_one(model, rollout.prompts[g], rollout.tokens[g, i, :n], T)
        if logprobs is not None:
            torch.testing.assert_close(logprobs[r, :n], expected, rtol=1e-5, atol=2e-5)
            assert not logprobs[r, n:].any()
        loss = loss + (weights[r, :n] * expected).sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_plain(model, rollout, rows):
    """Log-probs of a pack to 1e-5, gradients to 1e-4 of the largest; or, where transformers itself is not that near to
    float64, at most four times as far from it: two right ways to round differ by that in one draw."""
    model.zero_grad()
    logprobs = response_logprobs(model, measure_head(model), pack_rows(rollout, rows), T)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    (weights * logprobs).sum().backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    plain = plain_gradients(model, rollout, rows, weights, logprobs)
    assert plain.keys() == mine.keys()
    off = [name for name, x in plain.items() if (mine[name] - x).abs().max() > 1e-4 * x.abs().max() + 1e-6]
    if off:
        exact = plain_gradients(copy.deepcopy(model).double(), rollout, rows, weights.double())
        for name in off:
            assert (mine[name] - exact[name]).abs().max() <= 4 * (plain[name] - exact[name]).abs().max(), name

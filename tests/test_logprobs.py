"""Response log-probs equal plain transformers, one sequence at a time, unpadded."""

import pytest
import torch
from architectures import FAMILIES, tiny_model

from gspo.logprobs import response_logprobs, rollout_logprobs
from gspo.types import Prompt, Rollout

T = 0.7
PROMPTS = [Prompt(i, tuple(range(5 + i, 5 + i + size)), "", "", "") for i, size in enumerate((9, 1, 4))]


def responses(seed=1):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3, 12, 1])
    tokens = torch.randint(2, 97, (3, 12), generator=g)
    return torch.where(torch.arange(12) < lengths[:, None], tokens, 0), lengths


def one_by_one(model, prompt, tokens, temperature):
    """log softmax(logits / T) of each response token, with no padding and no tricks."""
    ids = torch.tensor([[*prompt.ids, *tokens.tolist()]])
    logits = model(input_ids=ids).logits[0, len(prompt.ids) - 1 : -1] / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(-1, tokens[:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_equal_plain_transformers(family):
    model = tiny_model(family)
    tokens, lengths = responses()
    logprobs = response_logprobs(model, PROMPTS, tokens, lengths, T, pad_id=0)
    weights = torch.randn(3, 12)
    (weights * logprobs).sum().backward()
    mine = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = 0.0
    for r, prompt in enumerate(PROMPTS):
        n = int(lengths[r])
        expected = one_by_one(model, prompt, tokens[r, :n], T)
        torch.testing.assert_close(logprobs[r, :n], expected, rtol=1e-5, atol=2e-5)
        assert not logprobs[r, n:].any()
        loss = loss + (weights[r, :n] * expected).sum()
    loss.backward()
    for name_p, grad in zip(model.named_parameters(), mine, strict=True):
        scale = name_p[1].grad.abs().max()
        assert (grad - name_p[1].grad).abs().max() <= 1e-4 * scale + 1e-7, name_p[0]


def test_any_cut_into_micro_batches_gives_the_same_log_probs():
    model = tiny_model("qwen2")
    tokens, lengths = responses()
    zeros = torch.zeros(3, 1, 12)
    rollout = Rollout(PROMPTS, tokens[:, None], lengths[:, None], zeros, zeros, lengths[:, None] > 0, [[""]] * 3)
    cuts = ([[(0, 0), (1, 0), (2, 0)]], [[(0, 0)], [(1, 0), (2, 0)]], [[(2, 0)], [(0, 0)], [(1, 0)]])
    results = [rollout_logprobs(model, rollout, parts, len(parts) + 1, T, 0) for parts in cuts]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)
    assert results[0][1, 0].abs().min() > 0


def test_the_padding_token_may_be_a_real_one():
    """Models whose pad id is their end-of-sequence id: masks follow lengths, never ids."""
    model = tiny_model("llama")
    tokens = torch.tensor([[1, 1, 5], [7, 1, 1]])
    lengths = torch.tensor([3, 2])
    logprobs = response_logprobs(model, PROMPTS[:2], tokens, lengths, 1.0, pad_id=1)
    for r in range(2):
        n = int(lengths[r])
        torch.testing.assert_close(
            logprobs[r, :n], one_by_one(model, PROMPTS[r], tokens[r, :n], 1.0), rtol=1e-5, atol=1e-5
        )

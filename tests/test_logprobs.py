"""Response log-probs equal plain transformers, one sequence at a time, unpacked."""

import copy

import pytest
import torch
from architectures import FAMILIES, tiny_model

from gspo.kernels.logprob import KEEP_BYTES
from gspo.models.precision import rounded
from gspo.packing.logprobs import response_logprobs, rollout_logprobs, surrogate
from gspo.packing.pack import pack, pack_rows
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
    logprobs = response_logprobs(model, pack_rows(rollout, rows), T)
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


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_equal_plain_transformers(family):
    """Prompts and responses longer than the sliding windows, prompts of one token, responses that end at once."""
    assert_plain(tiny_model(family), RAGGED, SOME_ROWS)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize(
    ("prompts", "lengths"),
    [
        ((7,), [[9]]),  # N = 1
        ((1,), [[1, 1]]),  # nothing but ends of sequence behind one token
        ((1, 20), [[1, 16], [2, 1]]),
    ],
)
def test_packs_at_the_edges(family, prompts, lengths):
    rollout = a_rollout(prompts, lengths)
    assert_plain(tiny_model(family), rollout, [(g, i) for g in range(len(prompts)) for i in range(len(lengths[0]))])


@pytest.mark.usefixtures("kernels")
def test_any_cut_into_micro_batches_gives_the_same_log_probs():
    model = tiny_model("qwen2")
    cuts = ([SOME_ROWS], [SOME_ROWS[:2], SOME_ROWS[2:]], [[row] for row in SOME_ROWS])
    results = [rollout_logprobs(model, RAGGED, parts, len(parts) + 1, T) for parts in cuts]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)
    for row in SOME_ROWS:
        assert results[0][row][: RAGGED.lengths[row]].abs().min() > 0


def test_the_padding_token_may_be_a_real_one():
    """Models whose pad id is their end-of-sequence id: masks follow lengths, never ids."""
    model = tiny_model("llama")
    tokens = torch.tensor([[1, 1, 5], [7, 1, 1]])
    lengths = torch.tensor([3, 2])
    logprobs = response_logprobs(model, pack(RAGGED.prompts[:2], [0, 1], tokens, lengths), 1.0)
    for r in range(2):
        n = int(lengths[r])
        torch.testing.assert_close(
            logprobs[r, :n], one_by_one(model, RAGGED.prompts[r], tokens[r, :n], 1.0), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("head", ["measured", "its own"])
def test_a_loss_over_tokens_by_its_slope_has_the_gradient_of_the_loss(head, monkeypatch):
    """Piece by piece, as the head cuts them: every piece hears of its own tokens."""
    monkeypatch.setitem(KEEP_BYTES, "cpu", 1)
    monkeypatch.setattr("gspo.kernels.logprob.LEAST_PIECE", 7)
    model, packed = tiny_model("gemma2"), pack_rows(RAGGED, SOME_ROWS)
    target = torch.randn(int(packed.mask.sum()), generator=torch.Generator().manual_seed(3))
    assert len(packed.targets) == len(target) - 4
    (response_logprobs(model, packed, T)[packed.mask] - target).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.measured_head = model.measured_head if head == "measured" else None
    seen = []

    def slope(logprob, tokens):
        seen.append(tokens)
        return 2.0 * (logprob - target[tokens])

    surrogate(model, packed, T, slope).backward()
    assert sorted(torch.cat(seen).tolist()) == list(range(len(target)))
    assert (len(seen) > 2) == (head == "measured")
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert (p.grad - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-6


@pytest.mark.bf16
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_frozen_model_in_bf16_holds_what_autocast_would_make_of_it(family):
    """Bit for bit the log-probs of the float32 model under autocast, in less memory."""
    model = tiny_model(family)
    frozen = rounded(copy.deepcopy(model), torch.bfloat16)
    size = sum(p.nbytes for p in frozen.parameters()) / sum(p.nbytes for p in model.parameters())
    assert size <= (1.0 if family == "gpt2" else 0.85)  # GPT-2's layers are of another class: left alone
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        results = [response_logprobs(m, pack_rows(RAGGED, SOME_ROWS), T) for m in (model, frozen)]
    assert results[0].abs().max() > 1 and results[0].equal(results[1])

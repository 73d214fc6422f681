"""Response log-probs equal plain transformers, one sequence at a time, unpacked."""

import copy

import pytest
import torch
from architectures import FAMILIES, tiny_model
from plain_logprobs import RAGGED, SOME_ROWS, T, a_rollout, assert_plain, one_by_one

from gspo.kernels.logprob import KEEP_BYTES
from gspo.models.precision import cast_linear_layers
from gspo.packing.logprobs import response_logprobs, rollout_logprobs, surrogate
from gspo.packing.pack import pack, pack_rows
from gspo.packing.probe_head import measure_head


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
    results = [rollout_logprobs(model, measure_head(model), RAGGED, parts, len(parts) + 1, T) for parts in cuts]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)
    for row in SOME_ROWS:
        assert results[0][row][: RAGGED.lengths[row]].abs().min() > 0


def test_the_padding_token_may_be_a_real_one():
    """Models whose pad id is their end-of-sequence id: masks follow lengths, never ids."""
    model = tiny_model("llama")
    tokens = torch.tensor([[1, 1, 5], [7, 1, 1]])
    lengths = torch.tensor([3, 2])
    logprobs = response_logprobs(model, measure_head(model), pack(RAGGED.prompts[:2], [0, 1], tokens, lengths), 1.0)
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
    (response_logprobs(model, measure_head(model), packed, T)[packed.mask] - target).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    seen = []

    def slope(logprob, tokens):
        seen.append(tokens)
        return 2.0 * (logprob - target[tokens])

    surrogate(model, measure_head(model) if head == "measured" else None, packed, T, slope).backward()
    assert sorted(torch.cat(seen).tolist()) == list(range(len(target)))
    assert (len(seen) > 2) == (head == "measured")
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert (p.grad - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-6


@pytest.mark.bf16
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_frozen_model_in_bf16_holds_what_autocast_would_make_of_it(family):
    """Bit for bit the log-probs of the float32 model under autocast, in less memory."""
    model = tiny_model(family)
    head = measure_head(model)
    frozen = cast_linear_layers(copy.deepcopy(model), torch.bfloat16)
    size = sum(p.nbytes for p in frozen.parameters()) / sum(p.nbytes for p in model.parameters())
    assert size <= (1.0 if family == "gpt2" else 0.85)  # GPT-2's layers are of another class: left alone
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        results = [response_logprobs(m, head, pack_rows(RAGGED, SOME_ROWS), T) for m in (model, frozen)]
    assert results[0].abs().max() > 1 and results[0].equal(results[1])

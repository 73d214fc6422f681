"""Policy, opponent, reference and sampler of a run with model.lora, beside peft's own model on plain transformers."""

import pytest
import torch

pytest.importorskip("peft")

from adapted_models import WORLD, adapted, in_peft, move
from plain_logprobs import RAGGED, SOME_ROWS, T, one_by_one

from gspo.algorithm.update import make_optimizer
from gspo.errors import UserError
from gspo.models.loading import load_model
from gspo.packing.logprobs import response_logprobs, surrogate
from gspo.packing.pack import pack_rows
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import GREEDY, Sampler
from gspo.types import Prompt

PACK = pack_rows(RAGGED, SOME_ROWS)
WEIGHTS = torch.randn(PACK.mask.shape, generator=torch.Generator().manual_seed(0))


def plain(model, rows=SOME_ROWS):
    """The log-probs of each row of the rollout, one sequence at a time."""
    for g, i in rows:
        n = int(RAGGED.lengths[g, i])
        yield one_by_one(model, RAGGED.prompts[g], RAGGED.tokens[g, i, :n], T)


def packed(models, model):
    """The log-probs [G, N, L] of the rollout under one of the models, as training computes them."""
    return models.logprobs_under(model, RAGGED)


@pytest.fixture(scope="module")
def moved():
    """Models whose policy has left its base."""
    models = adapted("reference.refresh=never", "objective.anchor=opponent", f"rollout.temperature={T}")
    move(models)
    return models


def gradient_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen_coefficients", [False, True])
def test_log_probs_and_gradient_are_those_of_a_plain_peft_model(moved, frozen_coefficients):
    logprobs = response_logprobs(moved.policy, moved.head, PACK, T)
    if frozen_coefficients:
        weights = WEIGHTS[PACK.mask]
        loss = surrogate(moved.policy, moved.head, PACK, T, lambda logprob, tokens: weights[tokens])
    else:
        loss = (WEIGHTS * logprobs).sum()
    mine = gradient_of(moved.policy, loss)
    model, theirs = in_peft(moved).double(), 0.0
    for r, expected in enumerate(plain(model)):
        torch.testing.assert_close(logprobs[r, : len(expected)].double(), expected, rtol=1e-5, atol=2e-5)
        theirs = theirs + (WEIGHTS[r, : len(expected)] * expected).sum()
    expected = gradient_of(model, theirs)
    mine = {f"base_model.model.{name.replace('.policy.', '.default.')}": x for name, x in mine.items()}
    assert mine.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (mine[name] - wanted).abs().max() <= 3e-5 * wanted.abs().max() + 1e-6, name


def test_only_the_adapter_is_trained_and_it_is_float32(moved):
    trained = [p for group in make_optimizer(moved.policy, moved.cfg).param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in moved.trained.parameters()} and len(trained) == 2 * 7 * 3
    assert {p.dtype for p in trained} == {torch.float32}
    head = moved.policy.get_output_embeddings()
    assert not hasattr(head, "lora_A") and not head.weight.requires_grad


def test_the_reference_is_the_base_exactly_and_holds_no_weights(moved):
    base = adapted("reference.refresh=never", f"rollout.temperature={T}")  # before any step
    assert packed(moved, moved.frozen["initial"]).equal(packed(base, base.policy))
    assert not packed(moved, moved.policy).equal(packed(base, base.policy))
    assert not [*moved.frozen["initial"].parameters()] and moved.frozen_to_keep().keys() == {"opponent"}
    for row, expected in zip(SOME_ROWS, plain(load_model(None)), strict=True):
        found = packed(moved, moved.initial())[row][: len(expected)]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_the_opponent_stays_between_rounds_and_becomes_the_policy_when_one_begins():
    models = adapted("reference.refresh=round", f"rollout.temperature={T}")
    base = packed(models, models.policy)
    assert packed(models, models.frozen["opponent"]).equal(base), "both begin as the base"
    move(models)
    first = packed(models, models.policy)
    assert packed(models, models.frozen["opponent"]).equal(base) and not first.equal(base)
    models.new_opponent()
    move(models, seed=1)
    assert packed(models, models.frozen["opponent"]).equal(first)
    assert not packed(models, models.policy).equal(first)
    for row, expected in zip(SOME_ROWS, plain(in_peft(models, "opponent")), strict=True):
        torch.testing.assert_close(first[row][: len(expected)], expected, rtol=1e-5, atol=2e-5)


def prompts_of(tokenizer, texts=("Solve 3x = 9.", "Solve x - 4 = 5.", "2x")):
    return [Prompt(i, tuple(tokenizer(text)["input_ids"]), text, "", "") for i, text in enumerate(texts)]


def test_the_sampler_has_the_merged_weights_and_greedy_tokens_are_those_of_pefts_merged_model(moved, tokenizer):
    moved.refresh_sampler()
    merged = in_peft(moved).merge_and_unload()
    for name, p in moved.sampler.named_parameters():
        torch.testing.assert_close(p, merged.get_parameter(name), rtol=1e-6, atol=1e-6)
    sampler = Sampler(moved.sampler, tokenizer, WORLD.device)
    rollout = sampler.generate(prompts_of(tokenizer), 1, Sampling(0.0, max_new_tokens=12), purpose=GREEDY)
    for g, prompt in enumerate(rollout.prompts):
        n = int(rollout.lengths[g, 0])
        ids = [*prompt.ids, *rollout.tokens[g, 0, :n].tolist()]
        likeliest = merged(input_ids=torch.tensor([ids])).logits[0, len(prompt.ids) - 1 : -1].argmax(-1)
        assert likeliest.tolist() == ids[len(prompt.ids) :]


def test_what_is_sampled_is_the_policy_that_is_trained(moved, tokenizer):
    for size in (0.0, 0.05):
        move(moved, seed=2, size=size)
        moved.refresh_sampler()
        rollout = Sampler(moved.sampler, tokenizer, WORLD.device).generate(
            prompts_of(tokenizer), 4, Sampling(T, max_new_tokens=12)
        )
        torch.testing.assert_close(moved.logprobs_under(moved.policy, rollout), rollout.logprobs, rtol=1e-5, atol=2e-4)


def test_in_bf16_the_base_is_held_in_it_and_the_adapter_in_float32():
    models = adapted(dtype=torch.bfloat16)
    kept = {name: p.dtype for name, p in models.policy.named_parameters()}
    assert {dtype for name, dtype in kept.items() if "base_layer" in name} == {torch.bfloat16}
    assert {dtype for name, dtype in kept.items() if "lora_" in name} == {torch.float32}
    assert models.head is not None


def test_in_bf16_the_sampler_is_the_policy_but_for_rounding(tokenizer):
    models = adapted(f"rollout.temperature={T}", "reference.refresh=never", dtype=torch.bfloat16)
    move(models)
    models.refresh_sampler()
    rollout = Sampler(models.sampler, tokenizer, WORLD.device).generate(
        prompts_of(tokenizer), 4, Sampling(T, max_new_tokens=12)
    )
    policy, base = (models.logprobs_under(model, rollout) for model in (models.policy, models.initial()))
    apart = (policy - rollout.logprobs)[rollout.mask].abs().mean()
    assert apart < 0.05 * (base - rollout.logprobs)[rollout.mask].abs().mean()


def test_the_weights_cannot_be_shared_with_the_sampler(capsys):
    with pytest.raises(
        UserError, match=r"rollout.weights = 'share'.*adapter.*merged.*copy, or auto, or leave model.lora"
    ):
        adapted("rollout.weights=share")
    assert "rollout.weights=auto: copy" in (adapted("rollout.weights=auto"), capsys.readouterr().out)[1]


def test_the_first_values_depend_on_the_seed_alone():
    one = [p.clone() for p in adapted().trained.parameters()]
    two = [*adapted().trained.parameters()]
    other = [*adapted("trainer.seed=1").trained.parameters()]
    assert all(a.equal(b) for a, b in zip(one, two, strict=True))
    assert not any(a.equal(b) for a, b in zip(one[::2], other[::2], strict=True))
    assert all(
        0 < a.abs().max() <= a.shape[1] ** -0.5 and not b.any() for a, b in zip(one[::2], one[1::2], strict=True)
    )

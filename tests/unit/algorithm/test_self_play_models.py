"""When rounds begin, the win rate against the previous self, and whose weights the sampler reads."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from repository import PROGRAM_ENV

from gspo.algorithm.self_play_models import SelfPlayModels, round_of, win_rate
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.models.loading import load_model
from gspo.models.precision import cast_linear_layers
from gspo.read_config import load_config
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import Sampler, shares_weights
from gspo.types import Prompt

WORLD = World(0, 1, torch.device("cpu"), None)


@pytest.mark.parametrize(
    ("steps", "rounds", "expected"),
    [
        (10, 3, [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]),  # floor(k S / R): 0, 3, 6
        (9, 3, [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        (8, 5, [0, 1, 1, 2, 3, 3, 4, 4]),  # 0, 1, 3, 4, 6
        (4, 1, [0, 0, 0, 0]),
        (3, 3, [0, 1, 2]),
        (2, 5, [2, 4]),  # more rounds than steps: some have none
    ],
)
def test_rounds_by_step(steps, rounds, expected):
    assert [round_of(step, steps, rounds) for step in range(steps)] == expected


@given(st.integers(1, 60), st.integers(1, 12))
def test_round_k_starts_at_floor_of_k_s_over_r(steps, rounds):
    of = [round_of(step, steps, rounds) for step in range(steps)]
    assert of == sorted(of) and of[-1] == rounds - 1
    for k in set(of):
        assert of.index(k) == k * steps // rounds


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 60))
def test_a_longer_run_goes_on_with_rounds_of_the_same_length(steps, rounds, more):
    of = [round_of(step, steps, rounds) for step in range(steps + more)]
    for k in set(of):
        assert of.index(k) == k * steps // rounds


@pytest.mark.parametrize(
    ("mine", "theirs", "margin", "wins", "ties"),
    [
        # 1.0 beats both; 0.5 beats 0.0 and ties 0.5
        ([[1.0, 0.5]], [[0.5, 0.0]], 0.1, 3.5 / 4, 1 / 4),
        # a gap of exactly the margin is a tie, one of 0.11 is none
        ([[0.8, 0.3]], [[0.7, 0.19]], 0.1, (0.5 + 1 + 0 + 1) / 4, 1 / 4),
        ([[1.0, 0.0]], [[1.0, 0.0]], 0.1, 1 / 2, 2 / 4),
        ([[0.1, 0.1]], [[0.0, 0.0]], 0.1, 1 / 2, 1.0),
        ([[0.1, 0.1]], [[0.0, 0.0]], 0.0, 1.0, 0.0),
        ([[0.0, 0.0]], [[1.0, 1.0]], 0.1, 0.0, 0.0),
        # prompts are compared with themselves only
        ([[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]], 0.1, 1 / 2, 0.0),
        # unequal numbers of answers
        ([[1.0]], [[1.0, 0.0, 0.0]], 0.1, 2.5 / 3, 1 / 3),
    ],
)
def test_win_rate_by_hand(mine, theirs, margin, wins, ties):
    assert win_rate(torch.tensor(mine), torch.tensor(theirs), margin) == pytest.approx((wins, ties))


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.5]), st.integers(1, 4), st.integers(1, 4))
def test_the_two_sides_win_rates_sum_to_one(seed, margin, n, m):
    g = torch.Generator().manual_seed(seed)
    levels = torch.tensor([0.0, 0.1, 0.5, 1.0])
    a, b = (levels[torch.randint(0, 4, (3, k), generator=g)] for k in (n, m))
    (forth, ties), (back, same) = win_rate(a, b, margin), win_rate(b, a, margin)
    assert forth + back == pytest.approx(1.0) and ties == pytest.approx(same)
    order = torch.randperm(n, generator=g)
    assert win_rate(a[:, order], b, margin) == pytest.approx((forth, ties))


# ---- rollout.weights ----


def models_with(weights, dtype=torch.float32):
    return SelfPlayModels(load_config(None, [f"rollout.weights={weights}"]), WORLD, dtype)


def storages(model):
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", ["auto", "share", "copy"])
def test_the_sampler_reads_the_policys_storage_where_it_is_to_and_can(weights, dtype, capsys):
    if weights == "share" and dtype != torch.float32:
        with pytest.raises(UserError, match=r"rollout.weights = 'share'.*float32.*bfloat16.*copy.*precision=fp32"):
            models_with(weights, dtype)
        return
    models = models_with(weights, dtype)
    shared = weights != "copy" and dtype == torch.float32
    assert storages(models.sampler) & storages(models.policy) == (storages(models.policy) if shared else set())
    assert not storages(models.policy) & storages(models.frozen["opponent"]), "the opponent stays what it was"
    said = {"share": "auto: share", "copy": "auto: copy, 0.0012 GiB on each process, as the policy is kept in float32"}
    out = capsys.readouterr().out
    assert ("rollout.weights=" in out) == (weights == "auto")
    assert weights != "auto" or said["share" if shared else "copy"] in out


def test_shards_cannot_be_shared_and_auto_copies_them():
    assert shares_weights("auto", True, torch.float32)[0] is shares_weights("copy", True, torch.float32)[0] is False
    with pytest.raises(UserError, match="rollout.weights = 'share'.*sharded.*copy, or auto, or start one process"):
        shares_weights("share", True, torch.float32)


def test_both_sample_the_policy_as_it_stands_when_a_rollout_begins(tokenizer):
    prompts = [Prompt(i, tuple(tokenizer(t)["input_ids"]), t, "", "") for i, t in enumerate(("3x = 9", "x - 4 = 5"))]
    answers = {}
    for weights in ("share", "copy"):
        models, told = models_with(weights), []
        sampler = Sampler(models.sampler, tokenizer, WORLD.device)
        for _ in range(2):
            models.refresh_sampler()
            told.append(sampler.generate(prompts, 4, Sampling(0.9, max_new_tokens=12)).tokens.tolist())
            with torch.no_grad():
                for p in models.policy.parameters():
                    p.mul_(1.2)
        answers[weights] = told
    assert answers["share"] == answers["copy"] and answers["copy"][0] != answers["copy"][1]


@pytest.mark.slow
def test_sharing_saves_a_models_memory(run_program):
    done = run_program("tests/programs/shared_weights.py", env={**PROGRAM_ENV, "MALLOC_MMAP_THRESHOLD_": "65536"})
    assert done.returncode == 0, done.stderr[-2000:]
    size, shared, copied = map(float, done.stdout.splitlines()[-1].split())
    assert 1.9 * size < shared < 2.1 * size, "policy and opponent"
    assert 2.9 * size < copied < 3.1 * size


def test_a_frozen_self_in_bf16_is_the_model_rounded_and_lies_in_no_file():
    """Linear layers in bf16, the rest as in the float32 file, whose pages none of it keeps in memory."""
    frozen, expected = (
        models_with("auto", torch.bfloat16).frozen["opponent"],
        cast_linear_layers(load_model(None), torch.bfloat16),
    )
    mine, theirs = (m.state_dict() for m in (frozen, expected))
    assert mine.keys() == theirs.keys() and all(mine[k].equal(theirs[k]) for k in mine)
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16, torch.float32}
    assert not any(p.requires_grad for p in frozen.parameters())
    files = [
        line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line
    ]
    files = [[int(end, 16) for end in line.split("-")] for line in files]
    assert files and not any(a <= p < b for a, b in files for p in storages(frozen))

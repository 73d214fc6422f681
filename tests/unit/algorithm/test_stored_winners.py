"""Winners of earlier steps: which are kept, where they enter, what they must not touch, and the gradient they give."""

import json
from dataclasses import replace

import pytest
import torch
from architectures import tiny_model
from quick_run import SMALL, assert_equal_bits, final, finished, rows
from ranks import launch
from safetensors.torch import save_file
from torch.nn import functional as F

from gspo.algorithm.pairs import forks, preferences
from gspo.algorithm.stored_winners import StoredWinners, Winner, with_winners
from gspo.algorithm.update import Updater
from gspo.checkpoint.restore import load_winners
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.launch_checks import check_stored_winners
from gspo.metrics.step_metrics import Meter, observe
from gspo.packing.logprobs import response_logprobs
from gspo.packing.pack import pack_rows
from gspo.packing.probe_head import measure_head
from gspo.read_config import load_config
from gspo.types import Experience, Groups, Prompt, Rollout, Scores, Update

ALONE = World(0, 1, torch.device("cpu"), None)
N, L = 4, 6


def a_rollout(*ids, seed=0):
    """A group of four responses to each prompt, of two to six tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, L + 1, (len(ids), N), generator=g)
    real = torch.arange(L) < lengths[..., None]
    tokens = torch.randint(2, 90, (len(ids), N, L), generator=g) * real
    logprobs = -torch.rand(len(ids), N, L, generator=g) * real
    prompts = [Prompt(i, (4, 5, 6 + i), "", "", "") for i in ids]
    texts = [[f"{i}.{k}" for k in range(N)] for i in ids]
    return Rollout(prompts, tokens, lengths, logprobs, logprobs.abs(), torch.ones_like(lengths).bool(), texts)


def step(store, rollout, rewards, skipped=()):
    """A step of one rank -> the rollout and the rewards that it trains on, and the share of groups with a winner."""
    scores = Scores(torch.tensor(rewards), skipped=list(skipped))
    joined, scored, metric = store.stand_in(rollout, scores, list(range(len(rewards))), ALONE)
    assert scores.rewards.tolist() == torch.tensor(rewards).tolist(), "what was scored stays"
    return joined, scored.rewards, metric["stored_winners"]


def test_a_group_without_a_right_response_gets_the_prompts_last_winner():
    store, first, second = StoredWinners(0.1), a_rollout(7, 8, 9), a_rollout(9, 8, 7, seed=1)
    wrong, right = [0.0] * N, [0.0, 1.0, 0.0, 1.0]
    joined, rewards, share = step(store, first, [right, wrong, wrong])
    assert joined is first and share == 0.0 and rewards.tolist() == [right, wrong, wrong], "none is stored yet"

    joined, rewards, share = step(store, second, [wrong, wrong, wrong])
    n = int(first.lengths[0, 1])
    assert share == pytest.approx(1 / 3) and rewards.tolist() == [wrong, wrong, [0.0, 0.0, 0.0, 1.0]]
    assert joined.lengths[2, 3] == n and joined.tokens[2, 3, :n].equal(first.tokens[0, 1, :n])
    assert joined.logprobs[2, 3, :n].equal(first.logprobs[0, 1, :n]), "the first right response, as it was sampled"
    assert not joined.tokens[2, 3, n:].any() and not joined.logprobs[2, 3, n:].any() and not joined.entropy[2, 3].any()
    assert joined.replaced.tolist() == [[0] * 4, [0] * 4, [0, 0, 0, int(second.lengths[2, 3])]]
    assert joined.sampled.tolist() == [[True] * 4, [True] * 4, [True, True, True, False]]
    assert joined.samples_per_group == joined.select([2]).samples_per_group == 4, "four were sampled"
    for name in ("tokens", "logprobs", "entropy", "lengths"):
        new, old = getattr(joined, name), getattr(second, name)
        assert new[:2].equal(old[:2]) and new[2, :3].equal(old[2, :3]), name
    assert second.replaced.sum() == 0 and second.texts[2] == ["7.0", "7.1", "7.2", "7.3"], "the rollout itself stays"
    assert joined.texts[2] == ["7.0", "7.1", "7.2", ""]


def test_the_newest_of_the_best_is_kept_and_enters_only_where_none_is_as_good():
    store = StoredWinners(0.1)
    step(store, a_rollout(1), [[0.0, 0.5, 0.2, 0.1]])
    step(store, a_rollout(1, seed=1), [[0.3, 0.0, 0.4, 0.0]])
    assert store.winners[1].reward == 0.5, "a worse one does not take its place"
    newer = a_rollout(1, seed=2)
    joined, _, share = step(store, newer, [[0.4, 0.0, 0.5, 0.0]])
    assert joined is newer and share == 0.0, "0.5 is no better than 0.5"
    assert store.winners[1].tokens.tolist() == newer.tokens[0, 2, : newer.lengths[0, 2]].tolist()
    assert step(store, a_rollout(1), [[0.4, 0.0, 0.0, 0.0]])[2] == 0.0, "a gap of the margin is a tie"
    assert step(store, a_rollout(1), [[0.39, 0.0, 0.0, 0.0]])[2] == 1.0
    step(store, a_rollout(2), [[0.1] * N])
    assert 2 not in store.winners, "within the margin of 0 it is no winner"


def test_a_group_that_the_reward_function_failed_on_stays_left_out():
    store = StoredWinners(0.1)
    step(store, a_rollout(1), [[1.0, 0.0, 0.0, 0.0]])
    assert step(store, a_rollout(1), [[0.0] * N], skipped=[0])[2] == 0.0


def test_a_longer_winner_widens_the_rollout():
    winner = Winner(torch.arange(1, 10, dtype=torch.int32), -torch.ones(9), 1.0)
    rollout = a_rollout(1, 2)
    joined, _ = with_winners(rollout, torch.zeros(2, N), {1: winner})
    assert joined.tokens.shape == joined.logprobs.shape == joined.entropy.shape == (2, N, 9)
    assert joined.tokens[1, 3].tolist() == list(range(1, 10)) and joined.tokens[0, :, :L].equal(rollout.tokens[0])
    assert joined.mask.sum() == rollout.mask.sum() - rollout.lengths[1, 3] + 9


def test_the_oldest_go_where_there_are_too_many():
    store = StoredWinners(0.1, most_tokens=4 * L)
    for i in range(20):
        step(store, a_rollout(i, seed=i), [[1.0, 0.0, 0.0, 0.0]])
        assert store.tokens == sum(len(w.tokens) for w in store.winners.values()) <= 4 * L
    assert [*store.winners] == list(range(20))[-len(store.winners) :] and len(store.winners) >= 4


def test_a_rank_without_groups_takes_part():
    scores = Scores(torch.zeros(0, N))
    assert StoredWinners(0.1).stand_in(a_rollout(1).select([]), scores, [], ALONE)[2] == {"stored_winners": 0.0}


# ---- the gradient ----


def an_experience(model, seed=0):
    """Two groups, of which one has a stored winner, longer than the others."""
    rollout, rewards = a_rollout(0, 1, seed=seed), torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0] * N])
    winner = Winner(torch.arange(10, 18, dtype=torch.int32), torch.linspace(-7.0, -2.0, 8), 1.0)
    rollout, rewards = with_winners(rollout, rewards, {1: winner})
    exact = policy_logprobs(model, rollout).detach()
    real = rollout.mask
    reference, anchors = (exact + torch.randn(exact.shape) * 0.3 * real for _ in range(2))
    rollout = replace(rollout, logprobs=torch.where(rollout.sampled[..., None], exact, rollout.logprobs))
    beats = preferences(rewards, 0.1)
    groups = Groups(anchors, rewards, beats, forks(rollout.tokens, rollout.lengths), rollout.lengths)
    return Experience(rollout, groups, reference, [0, 1], 2, int(beats.sum()))


def policy_logprobs(model, rollout):
    packed = pack_rows(rollout, [(g, i) for g in range(len(rollout.prompts)) for i in range(N)])
    return response_logprobs(model, measure_head(model), packed, 0.9).view(*rollout.tokens.shape)


@pytest.mark.parametrize(
    "steps", [(), ("optim.micro_batch_responses=3",), ("optim.epochs_per_rollout=4",)], ids=["live", "cut", "8 steps"]
)
def test_the_gradient_is_the_pairs_own_with_the_winners_tokens_weighed_by_their_ratio(steps):
    """Against autograd on the formula; the KL term is about the samples, as many as there were."""
    model = tiny_model("llama")
    exp = an_experience(model)
    cfg = load_config(
        None, ["objective.kl_coef=0.5", "objective.preference_beta=0.5", "objective.after_fork=1",
               "objective.use_ranking_loss=false", "optim.grad_clip=1e9", *steps],
    )  # fmt: skip
    logprobs = policy_logprobs(model, exp.rollout)
    ratio = (logprobs.detach() - exp.rollout.logprobs).exp()
    weight = torch.ones_like(ratio)
    weight[1, 3] = ratio[1, 3].clamp_max(2.0)
    assert ratio[1, 3].min() < 0.9 and ratio[1, 3].max() > 2.0
    weighed = weight * logprobs + ((1 - weight) * logprobs).detach()  # the value of log pi, w times its gradient
    s = 0.5 * (weighed - exp.groups.anchors).sum(-1)
    gap = s[:, :, None] - s[:, None, :]
    loss = (exp.groups.beats * F.softplus(-gap)).sum() / (2 * N * (N - 1) / 2)
    d = torch.where(exp.rollout.sampled_mask, logprobs - exp.reference_logprobs, 0.0)
    loss = loss + 0.5 * 0.5 * d.square().sum() / (2 * N)
    expected = torch.autograd.grad(loss, list(model.parameters()))

    seen = []
    updater = Updater(model, measure_head(model), torch.optim.SGD(model.parameters()), cfg, ALONE)
    updater._step = lambda exp, update, coefs: seen.append([p.grad.clone() for p in model.parameters()])
    updater.run(exp, 0.0)
    for got, wanted in zip(seen[0], expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=2e-6)


def test_metrics_are_those_of_the_samples():
    """All sampled tokens are counted; the mismatch does not see how old the winner is."""
    model = tiny_model("llama")
    exp, cfg = an_experience(model), load_config(None, [])
    update = Update(policy_logprobs(model, exp.rollout).detach())
    scores = Scores(torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0] * N]))
    shown = Meter.merge([observe(exp, scores, update, cfg.objective).state()])
    assert shown["tokens"] == int(a_rollout(0, 1).lengths.sum())
    assert shown["mismatch"] < 1e-5 and shown["reward/batch_mean"] == 0.25
    assert shown["pairs/per_group"] == 2.0, "four of the first group's samples, none of the second's"


# ---- checkpoints ----


def a_store():
    store = StoredWinners(0.1)
    for i in (3, 0, 7):
        step(store, a_rollout(i, seed=i), [[0.0, 0.25 + i / 10, 0.0, 0.0]])
    return store


def test_what_a_checkpoint_keeps_is_what_goes_on(tmp_path):
    store, again = a_store(), StoredWinners(0.1)
    (tmp_path / "trainer").mkdir()
    save_file(store.tensors(), tmp_path / "trainer" / "winners.safetensors")
    again.load(load_winners(tmp_path, 97, 8))
    assert [*again.winners] == [3, 0, 7] and again.tokens == store.tokens, "in the order of their age"
    for name, x in store.tensors().items():
        assert x.equal(again.tensors()[name]), name
    assert StoredWinners(0.1).tensors() == {} == load_winners(tmp_path / "nowhere", 97, 8)


@pytest.mark.parametrize(
    ("name", "at", "value", "says"),
    [
        ("tokens", 0, 97, "tokens outside of 0 to 96"),
        ("prompts", 1, 8, "prompts outside of 0 to 7"),
        ("prompts", 1, 3, "a prompt twice"),
        ("lengths", 2, 99, "lengths outside"),
        ("lengths", 2, 1, "lengths that are not its tokens'"),
        ("rewards", 0, float("nan"), "rewards outside"),
        ("logprobs", 0, 1.0, "logprobs outside"),
    ],
)
def test_a_file_that_was_changed_is_refused(tmp_path, name, at, value, says):
    tensors = a_store().tensors()
    tensors[name][at] = value
    (tmp_path / "trainer").mkdir()
    save_file(tensors, tmp_path / "trainer" / "winners.safetensors")
    with pytest.raises(UserError, match=says):
        load_winners(tmp_path, 97, 8)


def test_trees_and_spin_have_no_place_for_a_stored_winner():
    check_stored_winners(load_config(None, ["rollout.stored_winners=true", "objective.algorithm=rloo"]))
    for other in ("rollout.trunks=4", "objective.algorithm=spin"):
        with pytest.raises(UserError, match=f"does not go with {other.replace('=', ' = ')}"):
            check_stored_winners(load_config(None, ["rollout.stored_winners=true", other]))


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit_and_on_two_ranks_as_on_one(run_program, tmp_path):
    problems = {"x + 5 = 12": 7, "3x - 4 = 11": 5, "2x + 9 = 1": -4, "x - 8 = 5": 13}
    text = [{"prompt": f"Solve: {p}", "ground_truth": str(x), "data_source": "math"} for p, x in problems.items()]
    (tmp_path / "rows.json").write_text(json.dumps(text))
    settings = (*SMALL[:2], f"data.train_files=[{tmp_path}/rows.json]", "data.train_batch_size=4", "rollout.n=2",
                "trainer.max_steps=6", "trainer.save_freq=4", "rollout.stored_winners=true", "reward.check_rows=0",
                "eval.before_and_after=false")  # fmt: skip
    finished(run_program, *settings, f"trainer.output_dir={tmp_path}")
    whole, checkpoint = tmp_path / "quick", tmp_path / "quick" / "checkpoints" / "step_000004"
    finished(run_program, *settings, f"trainer.output_dir={tmp_path / 'again'}", f"trainer.resume={checkpoint}")
    launch(run_program, 2, "train.py", *settings, f"trainer.output_dir={tmp_path / 'two'}")
    since_the_start = ("entropy_ratio", "response/length_ratio", "winner_logprob_drop")  # of a folder's own log
    own = ("time/", "memory/", "tokens_per_second", "balance", *since_the_start)
    folders = (whole, tmp_path / "again" / "quick", tmp_path / "two" / "quick")
    one, again, two = (
        [{k: v for k, v in row.items() if not k.startswith(own)} for row in rows(folder / "metrics.jsonl")]
        for folder in folders
    )
    assert sum(row["stored_winners"] for row in one[4:]) > 0, "a winner that the checkpoint kept has entered"
    assert one[4:] == again
    assert_equal_bits(final(whole), final(folders[1]))
    counted = ("stored_winners", "tokens_sampled")
    for a, b in zip(one, two, strict=True):
        assert [a[k] for k in counted] == [b[k] for k in counted]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2, abs=1e-6), a["step"]

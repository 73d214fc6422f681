"""Prompts chosen by a posterior of their success: which come, that none is lost, and the rewards over all of them."""

import math

import numpy as np
import pytest
import torch
from prompt_learner import Learner, some
from quick_run import SMALL, finished, rows
from ranks import launch
from safetensors.torch import load_file, save_file

from gspo.checkpoint.restore import load_order
from gspo.data.batches import Batches
from gspo.data.beta_batches import BetaBatches
from gspo.errors import UserError

N = 8


def visits(batches, steps, chances, seed=0):
    """How often each prompt came in some steps, its responses right with the chances [P]."""
    draw, came = np.random.default_rng(seed), np.zeros(len(chances), int)
    for _ in range(steps):
        ids = [p.id for p in batches.take()]
        assert len(ids) == len(set(ids)) == min(batches.size, len(chances))
        right = draw.random((len(ids), N)) < chances[ids, None]
        batches.record(right.any(1) & ~right.all(1), right.mean(1), right.any(1).astype(float))
        came[ids] += 1
    return came


def test_prompts_with_contrast_come_most_and_none_is_lost():
    chances = np.repeat([0.0, 0.1, 0.5, 0.9, 1.0], 20)
    batches = BetaBatches(some(100), 10, seed=0, responses=N)
    assert (visits(batches, 10, chances) > 0).mean() > 0.6, "what was not seen yet comes soon"
    came = visits(batches, 290, chances).reshape(5, 20)
    never, hard, even, easy, always = came.mean(1)
    assert even > 4 * max(hard, easy) and min(hard, easy) > max(never, always)
    assert came.min() >= 3, "29 passes' worth of prompts, and each has come at least three times"


def test_the_posterior_by_hand():
    """Two of three prompts are taken; a group counts half after three prompts more, that is, after 1.5 steps."""
    batches = BetaBatches(some(3), 2, seed=0, responses=4)
    ids = [p.id for p in batches.take()]
    batches.record([1, 0], [0.75, 0.5], [1.0, 0.5])
    assert batches.right[ids].tolist() == [3.0, 4.0] and batches.wrong[ids].tolist() == [1.0, 0.0], (
        "all alike at one half count as all right"
    )
    kept, before = 0.5 ** (2 / 3), batches.right.copy()
    ids = [p.id for p in batches.take()]
    batches.record([math.nan, 0], [math.nan, 0.25], [math.nan, 0.25])
    assert batches.right[ids] == pytest.approx(before[ids] * kept), "one failed to be scored, one was all wrong"
    assert batches.wrong[ids[1]] >= 4.0


@pytest.mark.parametrize("responses", [2, 4, 8, 64])
def test_nearest_one_half_is_where_contrast_is_likeliest_for_every_group_size(responses):
    p = np.linspace(0.01, 0.99, 99)
    contrast = 1 - p**responses - (1 - p) ** responses
    nearer = np.abs(p[:, None] - 0.5) < np.abs(p - 0.5) - 1e-9
    assert (contrast[:, None] >= contrast - 1e-12)[nearer].all()


def test_the_mean_over_all_prompts_by_hand():
    """Those that came enter with their last group, and the newly come speak for those that never did."""
    batches = BetaBatches(some(10), 4, seed=0, responses=N)
    ids = [p.id for p in batches.take()]
    curves = batches.record([1] * 4, [0.2, 0.4, 0.6, 0.8], [1.0, 1.0, 1.0, 0.0])
    assert curves == {"reward_mean": pytest.approx(0.5), "reward_max": pytest.approx(0.75)}
    last = dict(zip(ids, [0.2, 0.4, 0.6, 0.8], strict=True))
    new = []
    while not new or len(new) == 4:
        ids = [p.id for p in batches.take()]
        new, known = [i for i in ids if i not in last], len(last)
        mean = [0.9 if i in new else 0.3 for i in ids]
        curves = batches.record([1] * 4, mean, [1.0] * 4)
        before = {i: 0.3 if i in ids else x for i, x in last.items()}
        last |= dict(zip(ids, mean, strict=True))
    wanted = (sum(before.values()) + (10 - known) * 0.9) / 10
    assert curves["reward_mean"] == pytest.approx(wanted)


@pytest.mark.parametrize("wrong", [0.0, 0.15])
def test_rewards_rise_with_the_policy_and_groups_have_more_contrast(wrong):
    def train(batches):
        return Learner(512, wrong).train(batches, 160)

    seen, plain = train(BetaBatches(some(512), 32, 0, responses=4)), train(Batches(some(512), 32, 0, spaced=False))
    quarters, truth = (seen[name].reshape(8, 20).mean(1) for name in ("reward_mean", "truth"))
    assert quarters[-1] > quarters[0] + 0.15 and (np.diff(quarters) > -0.01).all()
    assert np.abs(quarters - truth).max() < 0.1 and np.abs(quarters - truth)[4:].max() < 0.02, "late, then near"
    assert seen["contrast"].mean() > plain["contrast"].mean() + 0.02
    assert seen["truth"][-1] > plain["truth"][-1]
    assert seen["wrong"][80:].mean() <= wrong, "what nobody gets right takes no more than its part"


def test_a_resumed_order_goes_on_as_if_nothing_had_happened():
    chances = np.linspace(0, 1, 40)
    whole, first, second = (BetaBatches(some(40), 6, seed=1, responses=N) for _ in range(3))
    visits(whole, 30, chances)
    visits(first, 30, chances)
    second.load_state(first.state())
    taken = visits(second, 20, chances, seed=1)
    assert taken.tolist() == visits(whole, 20, chances, seed=1).tolist()
    assert whole.state().keys() == second.state().keys()
    for name, x in whole.state().items():
        assert x.equal(second.state()[name]), name
    assert visits(first, 20, chances, seed=1).tolist() == taken.tolist(), "a state is a copy"


def saved(folder, state):
    (folder / "trainer").mkdir()
    save_file(state, folder / "trainer" / "order.safetensors")
    return folder


def test_a_checkpoint_keeps_the_posterior(tmp_path):
    batches = BetaBatches(some(40), 6, seed=1, responses=N)
    visits(batches, 30, np.linspace(0, 1, 40))
    found = load_order(saved(tmp_path, batches.state()))
    assert found.keys() == batches.state().keys() and found["right"].equal(batches.state()["right"])


@pytest.mark.parametrize(
    ("name", "change"),
    [("right", lambda x: x - 9), ("wrong", lambda x: x * torch.nan), ("right", lambda x: x.float()),
     ("wrong", lambda x: x[1:]), ("steps", lambda x: -x - 1)],
)  # fmt: skip
def test_a_posterior_that_was_changed_is_refused(tmp_path, name, change):
    state = BetaBatches(some(40), 6, seed=1, responses=N).state()
    with pytest.raises(UserError, match="trainer/order.safetensors has "):
        load_order(saved(tmp_path, state | {name: change(state[name])}))


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit_and_on_two_ranks_as_on_one(run_program, tmp_path):
    settings = (*SMALL[:2], "data.train_batch_size=4", "trainer.max_steps=4", "trainer.save_freq=2", "rollout.n=2",
                "data.choice=beta", "data.spaced=false", "eval.before_and_after=false",
                "eval.round_prompts=0")  # fmt: skip
    finished(run_program, *settings, f"trainer.output_dir={tmp_path}")
    whole, checkpoint = tmp_path / "quick", tmp_path / "quick" / "checkpoints" / "step_000002"
    finished(run_program, *settings, f"trainer.output_dir={tmp_path / 'again'}", f"trainer.resume={checkpoint}")
    launch(run_program, 2, "train.py", *settings, f"trainer.output_dir={tmp_path / 'two'}")
    one, again, two = (rows(f / "quick" / "samples.jsonl") for f in (tmp_path, tmp_path / "again", tmp_path / "two"))
    assert one == two and [row for row in one if row["step"] > 2] == again
    seen = [rows(f / "quick" / "metrics.jsonl") for f in (tmp_path, tmp_path / "two")]
    assert [row["reward_mean"] for row in seen[0]] == pytest.approx([row["reward_mean"] for row in seen[1]])
    steps = [f / "checkpoints" / "step_000004" / "trainer" / "order.safetensors" for f in
             (whole, tmp_path / "again" / "quick", tmp_path / "two" / "quick")]  # fmt: skip
    orders = [load_file(file) for file in steps]
    for name, x in orders[0].items():
        assert all(x.nan_to_num(-1).equal(other[name].nan_to_num(-1)) for other in orders[1:]), name


def test_other_states(capsys):
    with pytest.raises(UserError, match="data.train_files: they have 9 rows"):
        BetaBatches(some(9), 4, 0, N).load_state(BetaBatches(some(8), 4, 0, N).state())
    batches = BetaBatches(some(8), 4, 0, N)
    batches.load_state(Batches(some(8), 4, 0).state())
    assert "nothing is known of any prompt yet" in capsys.readouterr().out and np.isnan(batches.mean).all()
    Batches(some(8), 4, 0).load_state(batches.state())

"""Checkpoints: everything comes back, whoever wrote it and however long that took."""

import threading

import pytest
import torch
from saved_run import a_run

from gspo.algorithm.update import make_optimizer
from gspo.checkpoint import checkpoints as ckpt
from gspo.checkpoint import manifest
from gspo.checkpoint.checkpoints import State
from gspo.checkpoint.find_runs import latest_checkpoint
from gspo.checkpoint.restore import load_order, load_state, restore
from gspo.errors import UserError
from gspo.models.loading import load_model


@pytest.fixture()
def run(tmp_path, tokenizer):
    return a_run(tmp_path, tokenizer)


def test_a_checkpoint_restores_everything(run):
    path = run.save(4, round=1, round_rewards=[[1.0, 0.1]], tokens_sampled=9)
    again, frozen = load_model(str(path)), load_model(None)
    with torch.no_grad():
        frozen.lm_head.weight.zero_()
    fresh, state = make_optimizer(again, run.cfg), load_state(path)
    torch.manual_seed(5)
    restore(path, again, fresh, {"opponent": frozen}, state)
    assert (state.step, state.round, state.round_rewards, state.tokens_sampled) == (4, 1, [[1.0, 0.1]], 9)
    for p, q in zip(run.policy.parameters(), again.parameters(), strict=True):
        assert p.equal(q)
        for key, value in run.optimizer.state[p].items():
            assert value.equal(fresh.state[q][key]), key
    for p, q in zip(run.opponent.parameters(), frozen.parameters(), strict=True):
        assert p.equal(q)
    assert load_order(path)["due"].tolist() == [3, 1]
    assert torch.get_rng_state().equal(torch.tensor(state.torch_rng, dtype=torch.uint8))


@pytest.mark.parametrize(("async_save", "at_once"), [("true", False), ("false", False), ("true", True)])
def test_a_checkpoint_holds_the_state_of_its_step_while_training_goes_on(
    tmp_path, tokenizer, monkeypatch, async_save, at_once
):
    """The next update moves weights, moments and opponent in place before a byte of them is written."""
    run = a_run(tmp_path, tokenizer, f"trainer.async_save={async_save}")
    go_on = threading.Event()
    behind = async_save == "true" and not at_once
    if behind:
        write = ckpt.write_weights
        monkeypatch.setattr(ckpt, "write_weights", lambda *args: go_on.wait(60) and write(*args))
    before = {name: p.detach().clone() for name, p in run.policy.named_parameters()}
    moments = [run.optimizer.state[p]["exp_avg"].clone() for p in run.policy.parameters()]
    run.begin(4, at_once)
    path = run.folder / "checkpoints" / "step_000004"
    run.checkpoints.commit()
    assert path.exists() != behind
    run.optimizer.step()
    with torch.no_grad():
        for p in run.opponent.parameters():
            p.zero_()
    go_on.set()
    run.checkpoints.finish()
    again, frozen = load_model(str(path)), load_model(None)
    restore(path, again, fresh := make_optimizer(again, run.cfg), {"opponent": frozen}, load_state(path))
    for (name, p), moment in zip(again.named_parameters(), moments, strict=True):
        assert p.equal(before[name]) and not p.equal(dict(run.policy.named_parameters())[name])
        assert fresh.state[p]["exp_avg"].equal(moment)
    assert all(p.equal(q) for p, q in zip(frozen.parameters(), load_model(None).parameters(), strict=True))


def test_a_checkpoint_without_a_data_order_is_refused(run):
    path = run.save(4)
    (path / "trainer" / "order.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no trainer/order.safetensors.*trainer.resume=never"):
        load_order(path)


def test_nothing_is_pickled_and_the_manifest_lists_every_file(run):
    path = run.save(4)
    files = {f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()}
    assert {f.rpartition(".")[2] for f in files} <= {"safetensors", "json", "jinja"}
    listed, wrong = manifest._read(path, True)
    assert set(listed) == files - {"manifest.json"} and wrong == ""


def test_only_the_last_few_are_kept_and_the_best(run):
    run.cfg.trainer.keep_last = 2
    for step, best in ((4, 4), (5, 5), (6, 5), (7, 5), (8, 5)):
        run.save(step, best_step=best, best_accuracy=0.1 * best)
    assert run.names() == ["best", "step_000005", "step_000007", "step_000008"]
    assert (run.folder / "checkpoints" / "best").resolve().name == "step_000005"
    assert latest_checkpoint(run.folder / "checkpoints").name == "step_000008"
    run.save(9, best_step=9, best_accuracy=1.0)
    assert run.names() == ["best", "step_000008", "step_000009"]
    run.cfg.trainer.keep_best = False
    for step in (10, 11):
        run.save(step, best_step=9, best_accuracy=1.0)
    assert run.names() == ["step_000010", "step_000011"]


def test_a_step_is_the_best_when_its_held_out_accuracy_is_above_all_before():
    state = State()
    seen = [None, 0.5, 0.5, None, 0.25, 0.75]
    for step, accuracy in enumerate(seen):
        state.step = step
        best = state.is_best({} if accuracy is None else {"heldout/accuracy": accuracy})
        assert best == (step in (1, 5))
    assert (state.best_step, state.best_accuracy) == (5, 0.75)


def test_of_equal_accuracies_the_higher_held_out_reward_is_the_best():
    state = State()
    for state.step, reward in enumerate((0.444, 0.571, 0.5), 1):
        state.is_best({"heldout/accuracy": 0.0, "heldout/reward_mean": reward})
    assert (state.best_step, state.best_reward) == (2, 0.571)
    assert not State(best_accuracy=0.5).is_best({"heldout/accuracy": 0.5, "heldout/reward_mean": 0.9}), "of an old run"


def test_updates_that_are_never_finite_stop_the_run():
    state = State()
    for skipped in (1, 1, 0, 1, 1):
        state.count_non_finite(skipped, limit=3)
    with pytest.raises(UserError, match="not finite"):
        state.count_non_finite(1, limit=3)


def test_a_frozen_model_that_the_checkpoint_lacks_is_refused(run):
    path, policy = run.save(4), load_model(None)
    with pytest.raises(UserError, match=r"has no model 'initial': objective.anchor .*model.path=CHECKPOINT"):
        restore(path, policy, make_optimizer(policy, run.cfg), {"initial": load_model(None)}, load_state(path))

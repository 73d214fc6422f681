"""Folders of runs: what may follow on what, and that a step is there whole or not at all."""

import json

import pytest
import torch

from gspo import checkpoint as ckpt
from gspo.config import load_config
from gspo.distributed import World
from gspo.errors import UserError
from gspo.model import load_model
from gspo.update import make_optimizer

ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture()
def saved(tmp_path, tokenizer):
    """A run with one step of AdamW behind it, saved; (cfg, folder, checkpoint, policy, optimizer, opponent)."""
    cfg = load_config("configs/quick.yaml", [f"trainer.output_dir={tmp_path}"])
    folder, _ = ckpt.open_run(cfg)
    policy, opponent = load_model(None), load_model(None)
    optimizer = make_optimizer(policy, cfg)
    optimizer.param_groups[0]["lr"] = 1e-3
    policy(input_ids=torch.tensor([[3, 9, 8]])).logits.square().sum().backward()
    optimizer.step()
    state = ckpt.State(step=4, round=1, round_rewards=[[1.0, 0.1]], tokens_sampled=9)
    frozen, order = {"opponent": opponent}, {"due": torch.tensor([3, 1])}
    path = ckpt.save(folder / "checkpoints", state, policy, optimizer, frozen, order, tokenizer, cfg, ALONE)
    return cfg, folder, path, policy, optimizer, opponent


def test_everything_comes_back(saved):
    cfg, _, path, policy, optimizer, opponent = saved
    again, frozen = load_model(str(path)), load_model(None)
    with torch.no_grad():
        frozen.lm_head.weight.zero_()
    fresh, state = make_optimizer(again, cfg), ckpt.load_state(path)
    torch.manual_seed(5)
    ckpt.restore(path, again, fresh, {"opponent": frozen}, state)
    assert (state.step, state.round, state.round_rewards, state.tokens_sampled) == (4, 1, [[1.0, 0.1]], 9)
    for p, q in zip(policy.parameters(), again.parameters(), strict=True):
        assert p.equal(q)
        for key, value in optimizer.state[p].items():
            assert value.equal(fresh.state[q][key]), key
    for p, q in zip(opponent.parameters(), frozen.parameters(), strict=True):
        assert p.equal(q)
    assert ckpt.load_order(path)["due"].tolist() == [3, 1]
    assert torch.get_rng_state().equal(torch.tensor(state.torch_rng, dtype=torch.uint8))


def test_a_checkpoint_without_an_order_is_told_of(saved):
    _, _, path, *_ = saved
    (path / "trainer" / "order.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no trainer/order.safetensors.*trainer.resume=never"):
        ckpt.load_order(path)


def test_nothing_is_pickled(saved):
    _, _, path, *_ = saved
    assert {f.suffix for f in path.rglob("*") if f.is_file()} <= {".safetensors", ".json", ".jinja"}


def test_the_same_run_goes_on_and_another_is_refused(saved):
    cfg, folder, path, *_ = saved
    assert ckpt.open_run(cfg) == (folder, path)
    for free in ("trainer.max_steps=999", "optim.micro_batch_tokens=7", "health.patience=3", "eval.n=2"):
        assert (
            ckpt.open_run(load_config("configs/quick.yaml", [f"trainer.output_dir={folder.parent}", free]))[1] == path
        )
    for other in ("trainer.seed=1", "optim.learning_rate=1", "rollout.n=5", "objective.margin=0.2", "model.path=x"):
        with pytest.raises(UserError, match=other.split("=")[0]):
            ckpt.open_run(load_config("configs/quick.yaml", [f"trainer.output_dir={folder.parent}", other]))


def test_never_sets_the_old_run_aside(saved):
    cfg, folder, path, *_ = saved
    cfg.trainer.resume = "never"
    assert ckpt.open_run(cfg) == (folder, None)
    aside = [p for p in folder.parent.iterdir() if p.name.startswith("quick-")]
    assert len(aside) == 1 and (aside[0] / "checkpoints" / path.name / "model.safetensors").exists()
    assert (folder.parent / "checkpoints").resolve() == folder / "checkpoints"


def test_half_a_checkpoint_is_never_the_latest(saved):
    cfg, folder, path, *_ = saved
    (folder / "checkpoints" / "step_000009.part" / "trainer").mkdir(parents=True)
    (folder / "checkpoints" / "step_000008").mkdir()
    assert ckpt.latest(folder / "checkpoints") == path
    ckpt.open_run(cfg)
    assert not (folder / "checkpoints" / "step_000009.part").exists()


def test_only_the_last_few_are_kept(saved, tokenizer):
    cfg, folder, _, policy, optimizer, _ = saved
    cfg.trainer.keep_last = 2
    for step in (5, 6):
        ckpt.save(folder / "checkpoints", ckpt.State(step=step), policy, optimizer, {}, {}, tokenizer, cfg, ALONE)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_000005", "step_000006"]


def test_a_real_folder_named_checkpoints_is_left_alone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.txt").write_text("precious")
    ckpt.open_run(load_config("configs/quick.yaml", [f"trainer.output_dir={tmp_path}"]))
    assert (tmp_path / "checkpoints" / "mine.txt").read_text() == "precious"


def test_an_evaluation_is_repeated_only_for_another_step(tmp_path):
    assert ckpt.needs_test(tmp_path, "eval_after", 6, ALONE)
    ckpt.write_json(tmp_path / "eval_after.json", {"step": 6})
    assert not ckpt.needs_test(tmp_path, "eval_after", 6, ALONE)
    assert ckpt.needs_test(tmp_path, "eval_after", 9, ALONE)
    assert json.loads((tmp_path / "eval_after.json").read_text()) == {"step": 6}


def test_updates_that_are_never_finite_stop_the_run():
    state = ckpt.State()
    for skipped in (1, 1, 0, 1, 1):
        state.count_bad(skipped, limit=3)
    with pytest.raises(UserError, match="not finite"):
        state.count_bad(1, limit=3)


def test_a_reward_function_that_changes_between_resumes_is_told_of_and_both_are_kept(tmp_path, capsys):
    ckpt.keep_reward_function(tmp_path, "return 0.5", 0)
    ckpt.keep_reward_function(tmp_path, "return 0.5", 20)
    assert capsys.readouterr().out == ""
    ckpt.keep_reward_function(tmp_path, "return 1.0", 40)
    assert "another one than this run began with" in capsys.readouterr().out
    assert (tmp_path / "reward_func.py").read_text() == "return 1.0"
    assert (tmp_path / "reward_func_until_step_40.py").read_text() == "return 0.5"
    ckpt.keep_reward_function(tmp_path, "return 0.0", 0)
    assert capsys.readouterr().out == "" and (tmp_path / "reward_func.py").read_text() == "return 0.0", "a run anew"

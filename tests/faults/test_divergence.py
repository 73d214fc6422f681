"""A run whose updates are no longer finite keeps what it had before."""

import pytest
from saved_run import a_run

from gspo.checkpoint.checkpoints import State
from gspo.errors import UserError


def test_steps_without_a_finite_update_push_no_good_checkpoint_out(tmp_path, tokenizer, capsys):
    run = a_run(tmp_path, tokenizer, "trainer.keep_last=2", "trainer.keep_best=false")
    for step in (1, 2):
        run.save(step)
    for bad in (1, 2, 3):
        run.save(2 + bad, bad_steps=bad)
    assert run.names() == ["step_000001", "step_000002"]
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("checkpoint ")]
    assert said[0] == "step 3 is not saved: its update was not finite."
    run.begin(6, at_once=True, bad_steps=4)  # the end of the run
    assert run.names() == ["step_000001", "step_000002", "step_000006"]
    run.save(7)
    assert run.names() == ["step_000006", "step_000007"]


def test_the_message_names_the_step_that_spoiled_the_weights_and_a_checkpoint_before_it():
    state = State()
    for step in range(1, 8):
        state.step = step
        if step < 7:
            state.count_non_finite(int(step > 4), limit=3)
    with pytest.raises(UserError, match=r"those of step 4, whose update was the last.*resume=.../step_000003 and"):
        state.count_non_finite(1, limit=3, saved=lambda: [1, 3, 4])


@pytest.mark.parametrize(
    ("step", "says"), [(3, "the weights are those of the start"), (4, "go on from before it: the start")]
)
def test_without_a_checkpoint_the_run_begins_anew(step, says):
    state = State(step=step, bad_steps=2)
    with pytest.raises(UserError, match=says):
        state.count_non_finite(1, limit=3, saved=lambda: [1, 2])


@pytest.mark.slow
def test_a_diverged_run_keeps_its_good_checkpoints(run_program, tmp_path):
    """The first update is finite and spoils the weights; those after it are not."""
    done = run_program(
        "train.py", "--config", "configs/quick.yaml", "data.train_batch_size=2", "rollout.max_new_tokens=24",
        "eval.before_and_after=false", "eval.round_prompts=0", "trainer.max_steps=12", "trainer.save_freq=1",
        "trainer.keep_last=3", "reward.workers=1", "reward.check_rows=0", f"trainer.output_dir={tmp_path}",
        "optim.learning_rate=1e30", "optim.schedule=constant", "optim.warmup_steps=0",
    )  # fmt: skip
    assert done.returncode == 2 and "is not saved: its update was not finite" in done.stdout
    assert "whose update was the last" in done.stderr or "those of the start" in done.stderr
    for name in (p.name for p in (tmp_path / "quick" / "checkpoints").iterdir()):
        assert f"step {int(name[5:])} is not saved" not in done.stdout

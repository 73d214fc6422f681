"""Adapters on several gloo ranks: the gradient, the samples and the checkpoint of one process."""

import pytest

pytest.importorskip("peft")

from ranks import FEW, gradient, launch

from gspo.models.safetensors_files import open_weights

LORA = ("model.lora={rank: 4}", "reference.refresh=round")


def assert_near(one, two, tolerance):
    assert one.keys() == two.keys()
    for name in one:
        scale = one[name].abs().max()
        assert scale > 0 and (one[name] - two[name]).abs().max() <= tolerance * scale, name


@pytest.fixture(scope="module")
def alone(run_program, tmp_path_factory):
    """Gradient and samples of one process."""
    return gradient(run_program, tmp_path_factory.mktemp("alone"), 1, *LORA)


@pytest.mark.slow
def test_two_ranks_sample_score_and_differentiate_as_one(run_program, tmp_path, alone):
    two, same = gradient(run_program, tmp_path, 2, *LORA)
    assert same == alone[1] and {name.split(".")[-2] for name in two} == {"policy"}
    assert_near(alone[0], two, 1e-5)


@pytest.mark.slow
def test_ranks_that_share_a_sampler_merge_their_own_parts(run_program, tmp_path, alone):
    """Tensor parallel: rows of some weights, columns of others."""
    _, same = gradient(run_program, tmp_path, 2, *LORA, "rollout.tensor_model_parallel_size=2")
    assert same == alone[1]


@pytest.mark.slow
def test_two_ranks_train_as_one_and_their_checkpoint_resumes_on_one(run_program, tmp_path):
    args = ("--config", "configs/quick.yaml", *FEW, *LORA, "eval.before_and_after=false", "eval.round_prompts=4",
            "optim.learning_rate=1e-3")  # fmt: skip
    launch(run_program, 2, "train.py", *args, "trainer.max_steps=4", f"trainer.output_dir={tmp_path}/two")
    done = run_program("train.py", *args, "trainer.max_steps=4", f"trainer.output_dir={tmp_path}/one")
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, stem in ((".", "adapter_model"), ("trainer", "optimizer"), ("trainer", "opponent")):
        one, two = (
            open_weights(tmp_path / where / "quick/checkpoints/step_000004" / folder, stem) for where in ("one", "two")
        )
        assert set(one.names) == set(two.names)
        if stem != "optimizer":  # AdamW turns a moment's last digit into a step's sign where gradients are near 0
            assert_near(*({name: x.read(name) for name in x.names} for x in (one, two)), 2e-2)
    more = run_program("train.py", *args, "trainer.max_steps=5", f"trainer.output_dir={tmp_path}/two")
    assert more.returncode == 0 and "4 of 5 steps done" in more.stdout, more.stderr[-3000:]

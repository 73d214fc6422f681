"""Four ranks save; one, two and three go on from it as if they had been there all along."""

import json

import pytest
import torch
from repository import PROGRAM_ENV
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gspo.models.safetensors_files import open_weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(run_program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    done = run_program(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", "tests/programs/resume_on_fewer.py",
        folder, timeout=600, env=PROGRAM_ENV,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def third_step(folder):
    rows = [json.loads(line) for line in (folder / "quick" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    samples = [json.loads(line) for line in (folder / "quick" / "samples.jsonl").read_text().splitlines()]
    names = ("loss/total", "loss/preference", "loss/kl", "reward_mean", "grad_norm", "kl_divergence")
    return {name: rows[2][name] for name in names}, [row for row in samples if row["step"] == 3]


def test_the_next_step_has_the_same_loss_on_one_two_and_three_ranks(runs):
    folder, _ = runs
    numbers, samples = third_step(folder / "1")
    assert numbers["loss/total"] > 0 and numbers["kl_divergence"] > 1e-6, "the opponent is not the policy"
    for ranks in ("2", "3"):
        again, same = third_step(folder / ranks)
        assert again == pytest.approx(numbers, rel=1e-5, abs=1e-9) and same == samples


def test_each_rank_wrote_its_share_and_together_they_are_a_model(runs):
    folder, _ = runs
    step = folder / "4" / "quick" / "checkpoints" / "step_000002"
    for stem in ("model", "trainer/optimizer", "trainer/opponent"):
        sizes = [file.stat().st_size for file in step.glob(f"{stem}-0000?-of-00004.safetensors")]
        assert len(sizes) == 4 and max(sizes) < 1.15 * sum(sizes) / 4
    model = AutoModelForCausalLM.from_pretrained(step)
    weights = open_weights(step)
    for name, p in model.named_parameters():
        assert p.equal(weights.read(name)), name


def test_what_is_restored_on_one_rank_is_what_four_had(runs):
    """The third step of one and of three ranks starts there: weights, moments and opponent agree after it."""
    folder, _ = runs
    one = folder / "1" / "quick" / "checkpoints" / "step_000003"
    three = folder / "3" / "quick" / "checkpoints" / "step_000003"
    for where, stem in ((".", "model"), ("trainer", "optimizer"), ("trainer", "opponent")):
        mine, theirs = load_file(one / where / f"{stem}.safetensors"), open_weights(three / where, stem)
        assert mine.keys() == set(theirs.names)
        for name, x in mine.items():
            torch.testing.assert_close(theirs.read(name), x, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_two_ranks_find_a_flipped_byte_and_go_on_from_the_checkpoint_before(runs):
    folder, said = runs
    (line,) = [line for line in said.splitlines() if "is damaged" in line]
    assert "step_000002 is damaged: trainer/optimizer-00002-of-00004.safetensors has changed" in line
    assert "1 of 3 steps done" in said
    numbers, samples = third_step(folder / "1")
    again, same = third_step(folder / "2-damaged")  # steps 2 and 3, on two ranks instead of four
    assert same == samples and again == pytest.approx(numbers, rel=1e-3, abs=1e-5)
    names = {p.name for p in (folder / "2-damaged/quick/checkpoints").iterdir()}
    assert names == {"step_000001", "step_000002", "step_000002.damaged", "step_000003"}

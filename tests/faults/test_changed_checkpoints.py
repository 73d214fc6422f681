"""A checkpoint that somebody changed, without a manifest: every shape, type and number is checked before it is used."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_run import ALONE, a_run

from gspo.algorithm.update import make_optimizer
from gspo.checkpoint import manifest
from gspo.checkpoint.restore import load_held_out, load_order, load_state, restore
from gspo.errors import UserError

WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture()
def saved(tmp_path, tokenizer):
    run = a_run(tmp_path, tokenizer)
    step = run.save(4)
    held_out = {
        "tokens": torch.ones(2, 3, 5, dtype=torch.int64),
        "lengths": torch.full((2, 3), 5),
        "anchors": torch.zeros(2, 3, 5),
        "rewards": torch.zeros(2, 3),
    }
    save_file(held_out, step / "trainer" / "held_out.safetensors")
    (step / manifest.NAME).unlink()
    return run, step


def read_back(run, step):
    state = load_state(step)
    load_order(step)
    load_held_out(step, vocab_size=64)
    restore(step, run.policy, make_optimizer(run.policy, run.cfg), {"opponent": run.opponent}, state)


def test_as_it_was_written_it_is_read(saved):
    read_back(*saved)


TENSORS = {
    "a moment with fewer rows": ("optimizer", f"{WEIGHT}:exp_avg", lambda x: x[:3]),
    "a moment with more rows": ("optimizer", f"{WEIGHT}:exp_avg_sq", lambda x: torch.cat([x, x])),
    "a moment of no dimension": ("optimizer", f"{WEIGHT}:exp_avg", lambda x: x[0, 0]),
    "a moment of another type": ("optimizer", f"{WEIGHT}:exp_avg", lambda x: x.to(torch.int32)),
    "a moment that is gone": ("optimizer", f"{WEIGHT}:exp_avg_sq", None),
    "a moment of a tensor that is not there": ("optimizer", "else:exp_avg", lambda x: torch.zeros(3)),
    "a count of steps with two numbers": ("optimizer", f"{WEIGHT}:step", lambda x: torch.ones(2)),
    "a count of steps that is no number": ("optimizer", f"{WEIGHT}:step", lambda x: torch.tensor(float("nan"))),
    "a frozen weight with fewer rows": ("opponent", WEIGHT, lambda x: x[:3]),
    "a frozen weight that is broadcast": ("opponent", WEIGHT, lambda x: x[:1]),
    "a frozen weight of whole numbers": ("opponent", WEIGHT, lambda x: x.to(torch.int8)),
    "a frozen weight that is gone": ("opponent", WEIGHT, None),
    "an order of another type": ("order", "due", lambda x: x.double()),
    "an order with a shorter streak": ("order", "streak", lambda x: x[:1]),
    "an order before the first epoch": ("order", "at", lambda x: x - 9),
    "an order without a place": ("order", "at", None),
    "an order behind the last prompt": ("order", "at", lambda x: torch.tensor([0, 3])),
    "an order in an epoch that no run reaches": ("order", "at", lambda x: torch.tensor([2**40, 0])),
    "a token that the model does not have": ("held_out", "tokens", lambda x: x + 64),
    "a token below 0": ("held_out", "tokens", lambda x: x - 2),
    "a length beyond the row": ("held_out", "lengths", lambda x: x + 1),
    "rewards of other prompts": ("held_out", "rewards", lambda x: x[:1]),
    "anchors of another length": ("held_out", "anchors", lambda x: x[..., :2].contiguous()),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_does_not_fit_is_named(saved, name):
    run, step = saved
    stem, tensor, change = TENSORS[name]
    file = step / "trainer" / f"{stem}.safetensors"
    tensors = {key: x.clone() for key, x in load_file(file).items()}
    old = tensors.pop(tensor, None)
    save_file(tensors if change is None else tensors | {tensor: change(old).contiguous()}, file)
    with pytest.raises(UserError, match=rf"trainer/{stem}.safetensors .*it was changed, or is of another run"):
        read_back(run, step)


STATES = {
    "a key more": {"spaced": True},
    "a step as a text": {"step": "2"},
    "a step below 0": {"step": -5},
    "a step that is true": {"step": True},
    "a step above all": {"step": 10**30},
    "another precision": {"precision": "fp8"},
    "a short generator": {"torch_rng": [1, 2, 3]},
    "bytes above 255": {"torch_rng": [256] * torch.get_rng_state().numel()},
    "rewards as a text": {"round_rewards": "high"},
    "rewards in rows of different lengths": {"round_rewards": [[1.0], [1.0, 0.5]]},
    "metrics that are no numbers": {"pair_metrics": {"preference_accuracy": "good"}},
    "a number that no float holds": {"response_length": 10**400},
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_no_run_wrote_is_named(saved, name):
    run, step = saved
    file = step / "trainer" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | STATES[name]))
    with pytest.raises(UserError, match=rf"state.json.*{next(iter(STATES[name]))}"):
        read_back(run, step)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 100_000, '"a"'])
def test_a_state_that_is_no_object_is_refused(saved, content):
    run, step = saved
    (step / "trainer" / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state.json"):
        read_back(run, step)


# ---- the manifest, and what stands in for one ----

ENTRY = {"bytes": 3, "sha256": "x"}
ODD_FILES = {  # a manifest lists these, with a valid checksum of its own
    "a device without an end": {"/dev/zero": {"bytes": 0, "sha256": "x"}},
    "a file of somebody else": {"../../secret": ENTRY},
    "the folder itself": {".": ENTRY},
    "no name": {"": ENTRY},
    "a size that is a text": {"model.safetensors": {"bytes": "3", "sha256": "x"}, "a": ENTRY},
    "a size that is an object": {"model.safetensors": {"bytes": {}, "sha256": "x"}, "a": ENTRY},
    "a checksum that is a list": {"model.safetensors": {"bytes": 3, "sha256": []}},
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_manifest_that_leads_elsewhere_is_damage(tmp_path, name):
    files = {name: (entry["bytes"], entry["sha256"]) for name, entry in ODD_FILES[name].items()}
    (tmp_path / manifest.NAME).write_text(manifest._text(files))
    assert manifest.find_damage(tmp_path, ALONE).startswith("manifest.json lists ")


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", "[]", '{"files": 1}', '{"files": {"a": 1}}', "\x00"])
def test_a_manifest_that_is_none_is_damage(tmp_path, content):
    (tmp_path / manifest.NAME).write_text(content)
    assert manifest.find_damage(tmp_path, ALONE).startswith("manifest.json cannot be read")


@pytest.mark.parametrize("file", ["trainer/state.json", "model.safetensors", "trainer"])
def test_a_pipe_or_a_folder_in_place_of_a_file_is_damage_and_not_waited_for(tmp_path, file):
    """With a manifest and without."""
    (tmp_path / "trainer").mkdir()
    if not (tmp_path / file).exists():
        os.mkfifo(tmp_path / file)
    (tmp_path / manifest.NAME).write_text(manifest._text({file: (0, "x")}))
    assert manifest.find_damage(tmp_path, ALONE) == f"{file} is no file"
    (tmp_path / manifest.NAME).unlink()
    damage = manifest.find_damage(tmp_path, ALONE, required=False)
    assert damage == f"{file} is no file" or (file == "trainer" and "No such file" in damage)


def test_a_state_nested_too_deep_is_damage(tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "state.json").write_text("[" * 100_000)
    assert "maximum recursion depth" in manifest.find_damage(tmp_path, ALONE, required=False)

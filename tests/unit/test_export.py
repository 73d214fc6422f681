"""`python -m gspo.export`: the model that leaves is the one that was trained, bit for bit."""

import json
import shutil

import pytest
import torch
from saved_run import a_run, no_file_above
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo.errors import UserError
from gspo.export import export, main
from gspo.models.loading import cast_parameters, load_model
from gspo.models.safetensors_files import open_weights

IDS = torch.arange(2, 40)[None]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    run = a_run(tmp_path_factory.mktemp("run"), tokenizer)
    run.save(4)
    return run


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_the_exported_model_has_exactly_the_logits_of_the_policy_in_memory(run, run_program, tmp_path, tokenizer):
    done = run_program(
        "-m", "gspo.export", run.folder / "checkpoints", tmp_path / "out", env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0 and "step_000004" in done.stdout and "verified" in done.stdout, done.stderr
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.float32 and logits(again).equal(logits(run.policy))
    assert not logits(again).equal(logits(load_model(None))), "it has been trained"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert {p.suffix for p in (tmp_path / "out").iterdir()} <= {".safetensors", ".json", ".jinja", ".md"}
    assert not {"manifest.json", "trainer"} & {p.name for p in (tmp_path / "out").iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_in_bf16_it_is_the_policy_cast_to_bf16_and_half_as_large(run, tmp_path):
    export(run.folder / "checkpoints", tmp_path / "out", torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert logits(again).equal(
        logits(cast_parameters(load_model(str(run.folder / "checkpoints/step_000004")), torch.bfloat16))
    )
    sizes = [
        p.stat().st_size
        for p in (run.folder / "checkpoints/step_000004/model.safetensors", tmp_path / "out/model.safetensors")
    ]
    assert sizes[0] / sizes[1] == pytest.approx(2.0, rel=0.01)


def test_shards_have_at_most_the_size_that_was_asked_for_and_make_the_same_model(run, tmp_path):
    export(run.folder / "checkpoints", tmp_path / "out", shard_bytes=700_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= 4 and all(p.stat().st_size < 710_000 for p in files)
    assert json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"].keys() == set(
        open_weights(tmp_path / "out").names
    )
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).equal(logits(run.policy))
    export(tmp_path / "out", tmp_path / "one")
    assert (tmp_path / "one/model.safetensors").exists(), "what has no manifest can be put together again as well"


def test_mistakes_are_one_paragraph_and_exit_code_2(run, run_program, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    here = run.folder / "checkpoints"
    with pytest.raises(UserError, match="has no config.json"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="exists and is not empty"):
        export(here, tmp_path / "full")
    for inside in (here / "step_000099", here / "step_000004" / "out"):
        with pytest.raises(UserError, match=r"lies in .*checkpoints. Name a folder outside of it."):
            export(here, inside)
    with pytest.raises(UserError, match="nothing does not exist"):
        export(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(UserError, match="mine.txt/x cannot be written: Not a directory"):
        export(here, tmp_path / "full" / "mine.txt" / "x")
    for size in ("inf", "0", "nan"):
        monkeypatch.setattr("sys.argv", ["export", str(here), str(tmp_path / "out"), "--max_shard_gb", size])
        with pytest.raises(UserError, match=f"--max_shard_gb {size}: must be"):
            main()
    done = run_program("-m", "gspo.export", here, tmp_path / "out", "--dtype", "int8")
    assert done.returncode == 2 and done.stderr.startswith("error: --dtype int8") and done.stderr.count("\n") == 1
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"] and not (tmp_path / "out").exists()


def test_nothing_is_left_where_the_source_is_no_whole_model(run, tmp_path):
    export(run.folder, tmp_path / "hf", shard_bytes=700_000)
    shutil.copytree(tmp_path / "hf", tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read as JSON"):
        export(tmp_path / "broken", tmp_path / "out", torch.bfloat16)
    next((tmp_path / "hf").glob("*.safetensors")).unlink()
    with pytest.raises(UserError):
        export(tmp_path / "hf", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "hf"]


def test_a_full_disk_leaves_nothing_behind(run, tmp_path):
    with no_file_above(100_000), pytest.raises(UserError, match="out cannot be written: File too large"):
        export(run.folder / "checkpoints", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_exported(tmp_path, tokenizer):
    path = a_run(tmp_path, tokenizer).save(4)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-5] ^= 4
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="damaged: model.safetensors has changed"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()

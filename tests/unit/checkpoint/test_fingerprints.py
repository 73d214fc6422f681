"""A run goes on with the same rows and model wherever they are, and not with others of the same name."""

import json
import os
import shutil

import pytest
from repository import ROOT
from saved_run import ALONE, a_run

from gspo.checkpoint import fingerprints
from gspo.checkpoint.fingerprints import of_model
from gspo.checkpoint.run_folder import open_run
from gspo.data.prompts import load_splits
from gspo.embedded import MODEL_DIR
from gspo.errors import UserError
from gspo.models.loading import load_model_config
from gspo.read_config import load_config

ROWS = [{"prompt": f"{i} + 1?", "ground_truth": str(i + 1), "data_source": "sums"} for i in range(4)]


@pytest.fixture()
def folder(tmp_path, monkeypatch):
    """The working folder: four rows, two held-out ones, a model."""
    shutil.copytree(MODEL_DIR, tmp_path / "m")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    write(tmp_path / "d.jsonl", ROWS)
    write(tmp_path / "v.jsonl", ROWS[:2])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture()
def go_on(folder, tokenizer):
    """Open the run again, with other names in its command -> the checkpoint it goes on from."""
    given = {"data.train_files": "d.jsonl", "data.val_files": "v.jsonl", "model.path": "m"}
    run = a_run(folder / "out", tokenizer, *(f"{key}={name}" for key, name in given.items()))

    def go_on(**changed):
        names = {**given, **{key.replace("__", "."): name for key, name in changed.items()}}
        cfg = load_config(
            "configs/quick.yaml", [f"trainer.output_dir={folder / 'out'}", *(f"{k}={n}" for k, n in names.items())]
        )
        splits = load_splits(cfg, tokenizer, load_model_config(None))
        return open_run(cfg, ALONE, {"model.path": of_model(cfg.model.path), **splits.fingerprints})[1]

    run.save(4)
    assert go_on().name == "step_000004"
    return go_on


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def copy_of(folder, name, where):
    """A copy in another folder -> its path."""
    (folder / where).mkdir(exist_ok=True)
    source, to = folder / name, folder / where / name
    shutil.copytree(source, to) if source.is_dir() else shutil.copy(source, to)
    return str(to)


@pytest.mark.parametrize(
    "name", ["./d.jsonl", "{cwd}/d.jsonl", "x/../d.jsonl", "[d.jsonl]", "{copy}", "{json}", "{blank}"]
)
def test_the_same_rows_by_another_name_go_on(folder, go_on, name):
    (folder / "x").mkdir()
    (folder / "as_list.json").write_text(json.dumps(ROWS))
    (folder / "blank.jsonl").write_text("\n\n".join(json.dumps(row) for row in ROWS))
    copy = copy_of(folder, "d.jsonl", "scratch")
    name = name.format(cwd=folder, copy=copy, json="as_list.json", blank="blank.jsonl")
    assert go_on(data__train_files=name).name == "step_000004"
    assert go_on(data__train_files=copy, data__val_files="./v.jsonl").name == "step_000004"


def test_rows_split_over_files_are_the_same_rows(folder, go_on):
    write(folder / "a.jsonl", ROWS[:1])
    write(folder / "b.jsonl", ROWS[1:])
    assert go_on(data__train_files="[a.jsonl, b.jsonl]").name == "step_000004"
    with pytest.raises(UserError, match="does not hold the rows"):
        go_on(data__train_files="[b.jsonl, a.jsonl]")


@pytest.mark.parametrize("name", ["m/", "./m", "{cwd}/m", "{copy}", "{link}"])
def test_the_same_model_by_another_name_goes_on(folder, go_on, name):
    os.symlink(folder / "m", folder / "link")
    name = name.format(cwd=folder, copy=copy_of(folder, "m", "scratch"), link="link")
    assert go_on(model__path=name).name == "step_000004"


@pytest.mark.parametrize(
    ("change", "way"),
    [
        (lambda rows: rows[::-1], "4 rows then, 4 now.*trainer.resume=.*step_000004 trainer.run_name=OTHER"),
        (lambda rows: [*rows[:3], {**rows[3], "ground_truth": "5"}], "trainer.resume=.*step_000004"),
        (lambda rows: [*rows[:3], {**rows[3], "solution": "5"}], "trainer.resume=.*step_000004"),
        (lambda rows: [{**row, "data_source": "b"} for row in rows], "trainer.resume=.*step_000004"),
        (lambda rows: rows[:3], "4 rows then, 3 now.*model.path=.*step_000004 trainer.run_name=OTHER"),
    ],
    ids=["order", "answer", "solution", "source", "fewer"],
)
def test_other_rows_of_the_same_name_are_told_with_the_ways_to_go_on(folder, go_on, change, way):
    write(folder / "d.jsonl", change(ROWS))
    with pytest.raises(
        UserError, match=rf"data.train_files = \['d.jsonl'\] does not hold the rows .*{way}.*resume=never"
    ):
        go_on()
    write(folder / "d.jsonl", ROWS)
    assert go_on().name == "step_000004"


def test_other_held_out_rows_are_told_too_but_not_another_number_of_them(folder, go_on):
    write(folder / "v.jsonl", ROWS[2:])
    with pytest.raises(UserError, match="data.val_files = .* does not hold the rows"):
        go_on()
    write(folder / "v.jsonl", ROWS[:2])
    assert go_on(eval__round_prompts=1).name == "step_000004"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_another_model_of_the_same_name_is_told(folder, go_on, file):
    whole = (folder / "m" / file).read_bytes()
    changed = whole.replace(b"}", b" }", 1) if file.endswith("json") else whole[:-4] + b"\x01\x02\x03\x04"
    (folder / "m" / file).write_bytes(changed)
    with pytest.raises(UserError, match="model.path = 'm' does not hold the model that the run in .* began with"):
        go_on()


def test_large_weights_that_were_trained_differ_whatever_is_read_of_them(tmp_path):
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(bytes(3 << 20))
    same = of_model(str(tmp_path / "a"))
    file.write_bytes(bytes(3 << 20))
    assert of_model(str(tmp_path / "a")) == same != of_model(None)
    for changed in (b"\x01" * (3 << 20), bytes((3 << 20) - 1) + b"\x01", bytes((3 << 20) + 1)):
        file.write_bytes(changed)
        assert of_model(str(tmp_path / "a")) != same
    assert of_model("no/such-model-anywhere") == ""


def test_a_run_without_fingerprints_goes_by_the_place_of_its_files(folder, go_on):
    (folder / "out" / "quick" / fingerprints.NAME).unlink()
    assert go_on(data__train_files="./d.jsonl", model__path="m/").name == "step_000004"
    (folder / "out" / "quick" / fingerprints.NAME).write_text("{")
    with pytest.raises(UserError, match="holds a run with data.train_files"):
        go_on(data__train_files=copy_of(folder, "d.jsonl", "scratch"))


def test_the_reward_function_may_move(go_on, folder):
    (folder / "r.py").write_text("def compute_score(**given):\n    return 0.5\n")
    assert go_on(reward__path="r.py").name == "step_000004"
    assert go_on(reward__path="./r.py").name == "step_000004"

"""The splits of a run: the embedded one, own files, what must fit, and which prompts are the same."""

from pathlib import Path

import numpy as np
import pytest
from row_files import GOOD, lines_of

from gspo.data import prompts as data
from gspo.data.prompts import in_common, load_splits
from gspo.data.row_checker import prompt_key
from gspo.embedded.equations import SEED_ROW
from gspo.errors import UserError
from gspo.models.loading import load_model_config
from gspo.read_config import load_config


@pytest.fixture()
def splits(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)  # the embedded data is written below the working directory

    def splits(*overrides, **options):
        return load_splits(load_config(None, overrides), tokenizer, load_model_config(None), **options)

    return splits


def test_without_files_the_embedded_equations_are_written_and_read(splits, tmp_path):
    found = splits()
    assert [len(part) for part in (found.train, found.val, found.test)] == [2048, 64, 512]
    first = found.train[0]
    assert {"prompt": first.text, "ground_truth": first.ground_truth, "data_source": first.data_source} == SEED_ROW
    assert sorted(p.name for p in Path("data/equations").iterdir()) == ["dev.json", "test.json", "train.json"]


def test_limits_and_own_files(splits, write):
    mine = write([{**GOOD, "prompt": c} for c in "abcd"])
    found = splits("eval.prompts=3", "eval.round_prompts=2", f"data.train_files={mine}", f"data.val_files={mine}")
    assert [[p.text for p in part] for part in (found.train, found.val, found.test)] == [
        ["a", "b", "c", "d"],
        ["a", "b"],
        ["a", "b", "c"],  # val_files, where there are no test_files
    ]
    found = splits("eval.round_prompts=0", f"data.train_files={mine}", f"data.test_files={mine}")
    assert (len(found.train), found.val, len(found.test)) == (4, [], 4)
    found = splits(f"data.train_files={mine}")
    assert (len(found.train), found.val, found.test) == (4, [], [])
    assert not Path("data").exists()


def test_an_evaluation_reads_only_the_test_split(splits, write):
    mine = write([GOOD])
    found = splits(f"data.train_files={mine}", f"data.test_files={mine}", "data.val_files=no.json", only_test=True)
    assert (found.train, found.val, len(found.test)) == ([], [], 1)


def test_nothing_to_evaluate_on_is_an_error(splits, write):
    with pytest.raises(UserError, match=r"data\.test_files"):
        splits(f"data.train_files={write([GOOD])}", only_test=True)


def test_prompt_and_answer_must_fit_the_models_positions(splits, write):
    mine = f"data.train_files={write([{**GOOD, 'prompt': 'x' * 30}])}"
    (prompt,) = splits(mine).train
    room = 2048 - len(prompt.ids)
    assert len(splits(mine, f"rollout.max_new_tokens={room}").train) == 1
    with pytest.raises(UserError) as e:
        splits(mine, f"rollout.max_new_tokens={room + 1}")
    assert f"rollout.max_new_tokens = {room + 1}" in str(e.value) and "2048 positions" in str(e.value)


def test_training_prompts_among_the_held_out_ones_are_counted(splits, write, capsys):
    train = write(lines_of("a", "one  more\n", "c", "é", "c", *map(str, range(100))), "train.jsonl")
    val, test = write(lines_of("c", "x"), "val.jsonl"), write(lines_of("y", " one more", "é"), "test.jsonl")
    files = f"data.train_files={train}", f"data.val_files={val}", f"data.test_files={test}"
    splits(*files)
    out = capsys.readouterr().out
    assert (
        out.startswith("warning: 4 of 105 training prompts are also among the held-out ones") and "\n" not in out[:-1]
    )
    splits(files[0], f"data.val_files={write(lines_of('z'), 'z.jsonl')}")
    splits(*files, only_test=True)
    assert capsys.readouterr().out == ""


def test_what_makes_two_prompts_the_same():
    def of(*contents):
        return prompt_key([{"role": "user", "content": c} for c in contents])

    assert of("a b") == of(" a\r\n\t\v b\f") == of("a   b")
    assert len({of("a b"), of("ab"), of("a c"), of("ä b"), of("\ud800"), of("a", "b", "c")}) == 6
    keys = np.array([5, -3, 5, 9, 2**62])
    assert in_common(keys, np.array([9, -3, 7])).tolist() == [False, True, False, True, False]
    assert in_common(keys, np.zeros(0, np.int64)).tolist() == [False] * 5


def test_which_split_of_a_data_set_each_list_of_files_means(splits, monkeypatch):
    class Enough(Exception):
        pass

    asked = []

    def open_source(name, split):
        asked.append((name, split))
        raise Enough

    monkeypatch.setattr(data, "open_source", open_source)
    for wanted, files in [("test", "data.test_files=b"), ("validation", "data.val_files=b")]:
        with pytest.raises(Enough):
            splits("data.train_files=a", files, only_test=True)
        assert asked.pop() == ("b", wanted)
    with pytest.raises(Enough):
        splits("data.train_files=a")
    assert asked == [("a", "train")]


# ---- what is trained on is always said ----


@pytest.mark.parametrize(
    "overrides",
    [["model.path=m"], ["model.path=m", "data.val_files=a.json"], ["model_path=m", "data.train_files=null"]],
)
def test_a_model_without_data_is_refused(splits, overrides):
    with pytest.raises(UserError, match=r"model.path = 'm', but data.train_files names no data.*train_files=embedded"):
        splits(*overrides)
    assert not Path("data").exists()


def test_the_embedded_equations_can_be_asked_for_in_place_of_any_file(splits, write):
    mine = write([GOOD])
    found = splits("model.path=m", "data.train_files=embedded")
    assert (len(found.train), found.val, found.test) == (2048, [], [])
    found = splits(f"data.train_files=[{mine}, embedded]", "data.val_files=embedded")
    assert [len(part) for part in (found.train, found.val, found.test)] == [2049, 64, 256]
    with pytest.raises(UserError, match="no/embedded"):
        splits("data.train_files=no/embedded")


def test_prompts_name_their_files_and_how_many_rows_these_have(splits, write):
    a, b = write([GOOD] * 1200, "a.json"), write([GOOD], "b.json")
    found = splits(f"data.train_files=[{a}, {b}]", f"data.val_files={b}")
    assert found.train.files() == f"{a} (1,200 rows), {b} (1 row)" and found.val.files() == f"{b} (1 row)"


def test_a_prompt_with_different_truths_is_said_with_its_first_places(splits, write, capsys):
    asked = [("a", "1"), ("b", "2"), ("a ", "1"), ("c", "3"), ("b", "4"), ("a", "5"), ("b", "6"), ("d", ["7"])]
    mine = write([{**GOOD, "prompt": prompt, "ground_truth": truth} for prompt, truth in asked])
    (Path(mine).parent / "r.py").write_text("def compute_score(solution_str, ground_truth):\n    return 1.0")
    splits(f"data.train_files={mine}", "reward.path=r.py")
    said = [line for line in capsys.readouterr().out.splitlines() if "different ground truths" in line]
    assert said == [
        f"warning: data.train_files: 2 prompts have different ground truths in several rows (first: {mine}, row 2 has "
        f"'2' and {mine}, row 5 has '4'), so what is right in one row is wrong in another. python -m gspo.check_data "
        "names more."
    ]
    alike = write([{**GOOD, "prompt": "a", "ground_truth": 1}, {**GOOD, "prompt": "a", "ground_truth": "1"}], "x.json")
    none = write([{**GOOD, "prompt": "a", "ground_truth": None}, {**GOOD, "prompt": "a"}], "y.json")
    splits(f"data.train_files={alike}")
    splits(f"data.train_files={none}", "reward.path=r.py")
    assert "different ground truths" not in capsys.readouterr().out


def test_a_mistyped_file_is_named_by_those_beside_it_and_a_bare_name_is_no_data_set(splits, write):
    mine = Path(write([GOOD], "train.jsonl"))
    for given, said in {
        "trian.jsonl": "No such file or directory. Is train.jsonl meant",
        "train": "No such file. Is train.jsonl meant",
        f"{mine.parent}/train.json": f"Is {mine} meant",
        "other.jsonl": "No such file or directory.$",
        "dta/train.jsonl": "There is no folder dta.",
        "gsm8k": "data file gsm8k: No such file. JSON, .* data sets of the hub, named OWNER/NAME: openai/gsm8k:main",
    }.items():
        with pytest.raises(UserError, match=said):
            splits(f"data.train_files={given}")

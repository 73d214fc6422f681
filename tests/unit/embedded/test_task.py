"""What the embedded tasks share: problems dealt out to disjoint splits, and the same bytes every time."""

import hashlib
import json
import re

import pytest

from gspo.embedded import brackets, equations, sorting, systems, weekdays
from gspo.embedded.task import LANGUAGES, SPLIT_SIZES

# sha256 of train.json, dev.json and test.json one after the other: what was measured was measured on these.
FILES = {
    equations: "23cffaacd1702d13ed6ce94da7b51c2da34864a6f454ca4a207d2ee456b20e79",
    systems: "c64a82df186462aa7f6418c807051b7b648ffb27743767ff71634a57b0ef63f8",
    sorting: "adf9000e027da1037f9480ec3d25fd5f19055ee4b0c227e5510626a3d624b97b",
    weekdays: "785b8792c36c1daa38a61b6afb21219f064eb66e9d280f9b0783622f327b0f1c",
    brackets: "b74109f83082c2cd816bf8860e9a7bd688f12164104f20b30313a5fffb9bc38d",
}
LATER = (sorting, weekdays, brackets)


@pytest.fixture(scope="module", params=FILES, ids=lambda m: m.TASK.name)
def written(request, tmp_path_factory):
    """(module, folder of its three files)"""
    folder = tmp_path_factory.mktemp(request.param.TASK.name)
    request.param.write_splits(folder)
    return request.param, folder


def test_the_files_are_the_same_bytes_as_ever(written):
    module, folder = written
    names = ("train.json", "dev.json", "test.json")
    assert {p.name for p in folder.iterdir()} == {*names}
    assert hashlib.sha256(b"".join((folder / n).read_bytes() for n in names)).hexdigest() == FILES[module]


def test_no_prompt_is_in_two_files(written):
    _, folder = written
    prompts = [row["prompt"] for p in folder.iterdir() for row in json.loads(p.read_text(encoding="utf-8"))]
    assert len(prompts) == len(set(prompts))


@pytest.mark.parametrize("module", LATER, ids=lambda m: m.TASK.name)
def test_splits_are_disjoint_full_and_have_enough_of_every_shape(module):
    splits = module.split_problems()
    texts = [p.text for part in splits.values() for p in part]
    assert len(texts) == len(set(texts)) and len(splits["warm"]) > 2000
    assert {name: len(splits[name]) for name in SPLIT_SIZES} == {"train": 1024, "dev": 256, "test": 512}
    for name in SPLIT_SIZES:
        shapes = [p.shape for p in splits[name]]
        counts = {shapes.count(shape) for shape in shapes}
        assert min(counts) > 0.8 * len(shapes) / len(set(shapes)), (name, counts)


@pytest.mark.parametrize("module", LATER, ids=lambda m: m.TASK.name)
def test_rows_are_in_both_languages_and_say_which(module, tmp_path):
    module.write_splits(tmp_path)
    rows = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    sources = [row["data_source"] for row in rows]
    assert set(sources) == {f"{module.TASK.name}_{language}" for language in LANGUAGES}
    assert abs(sources.count(f"{module.TASK.name}_zh") / len(sources) - 0.5) < 0.05
    for row in rows:
        for part in ("prompt", "solution"):
            assert (re.search("[一-鿿]", row[part]) is not None) == row["data_source"].endswith("_zh"), row

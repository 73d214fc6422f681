"""Files of tensors: what is written is what safetensors reads, and parts are read without the rest."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo.errors import UserError
from gspo.models.safetensors_files import DTYPES, open_weights, write_weights


def test_what_is_written_is_read_by_safetensors_and_has_the_checksum_returned(tmp_path):
    tensors = {f"层.{i}": torch.randint(0, 2, (2, 3, i + 1)).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "bits": torch.randn(5).bfloat16()}
    size, digest = write_weights(tmp_path / "model.safetensors", tensors)
    written = (tmp_path / "model.safetensors").read_bytes()
    assert (len(written), hashlib.sha256(written).hexdigest()) == (size, digest)
    assert int.from_bytes(written[:8], "little") % 8 == 0, "the format wants its data aligned"
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, x in tensors.items():
        assert again[name].dtype == x.dtype and again[name].equal(x), name


def test_tensors_of_several_files_are_read_by_name_and_slice(tmp_path):
    x, y = torch.arange(24.0).view(4, 6), torch.tensor(7)
    save_file({"x": x}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"y": y}, tmp_path / "model-00002-of-00002.safetensors")
    where = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    weights = open_weights(tmp_path)
    assert weights.names == ["x", "y"] and weights.shape("x") == (4, 6) and weights.shape("y") == ()
    assert weights.dtype("y") == torch.int64
    assert weights.read("x").equal(x) and weights.read("y").equal(y)
    assert weights.read("x", (slice(1, 3), slice(0, 6))).equal(x[1:3])
    assert weights.read("x", (slice(4, 4), slice(0, 6))).shape == (0, 6), "a rank may hold nothing"


def resident_kb():
    with open("/proc/self/status") as f:
        return sum(int(line.split()[1]) for line in f if line.startswith(("RssAnon", "RssFile")))


def test_a_part_is_read_without_the_rest(tmp_path):
    write_weights(tmp_path / "model.safetensors", {"x": torch.ones(100, 250_000)})  # 100 MB
    weights = open_weights(tmp_path)
    before = resident_kb()
    part = weights.read("x", (slice(10, 12), slice(0, 250_000))).clone()
    assert part.sum() == 500_000 and resident_kb() - before < 20_000


def test_a_folder_without_weights_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"has no model.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x09" + bytes(30))
    with pytest.raises(UserError, match=r"model.safetensors is no whole safetensors file"):
        open_weights(tmp_path)
    (tmp_path / "other.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match=r"other.safetensors.index.json is no index"):
        open_weights(tmp_path, "other")

"""A model's weights read without the model: whole, and in shards on several ranks."""

import functools
import json
import shutil

import pytest
import torch
from architectures import FAMILIES, tiny_model
from ranks import launch
from safetensors.torch import load_file, save_file

from gspo.distributed.sharded_loading import allocate_and_load, meta_model
from gspo.distributed.sharding import materialize
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.models.loading import load_model

ALONE = World(0, 1, torch.device("cpu"), None)
whole = functools.partial(materialize, world=ALONE)
CONVERTED = {"mixtral"}  # its files hold experts one by one, which every rank reads


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_read_one_by_one_equal_the_model_that_transformers_opens(family, tmp_path):
    """Weights, buffers that no file holds, and logits, bit for bit; what is tied stays tied."""
    tiny_model(family).save_pretrained(tmp_path)
    plain, empty = load_model(str(tmp_path)), meta_model(str(tmp_path))
    assert all(p.is_meta for p in empty.parameters())
    mine = allocate_and_load(whole, empty, str(tmp_path))
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(mine, kind)()), dict(getattr(plain, kind)())
        assert list(ours) == list(theirs) and all(ours[name].equal(theirs[name]) for name in ours)
    ids = torch.randint(2, 97, (2, 9))
    with torch.no_grad():
        assert mine(input_ids=ids).logits.equal(plain(input_ids=ids).logits)


def test_a_model_of_another_dtype_and_in_several_files_is_read_as_well(tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    mine = allocate_and_load(whole, meta_model(str(tmp_path), torch.bfloat16), str(tmp_path))
    plain = load_model(str(tmp_path), torch.bfloat16)
    assert all(p.equal(q) for p, q in zip(mine.parameters(), plain.parameters(), strict=True))
    assert all(p.equal(q) for p, q in zip(mine.buffers(), plain.buffers(), strict=True))


def test_a_missing_weight_or_a_wrong_shape_is_refused_by_name(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "norm" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no weights for model.layers.0.input_layernorm.weight, .* and 1 more"):
        allocate_and_load(whole, meta_model(str(tmp_path)), str(tmp_path))
    weights["lm_head.weight"] = torch.zeros(96, 32)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight in the shape \[96, 32\], where .* \[97, 32\]"):
        allocate_and_load(whole, meta_model(str(tmp_path)), str(tmp_path))
    shutil.move(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="has no model.safetensors"):
        allocate_and_load(whole, meta_model(str(tmp_path)), str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "families",
    [
        pytest.param(("llama",), id="one"),
        pytest.param((*FAMILIES, "gemma3"), id="every one"),
    ],
)
def test_three_ranks_each_read_only_their_own_shards(run_program, tmp_path, families):
    """97 rows of embedding on 3 ranks: uneven. Together they hold, and read, every weight once."""
    for family in families:
        tiny_model(family).save_pretrained(tmp_path / "models" / family)
    launch(run_program, 3, "tests/programs/sharded_models.py", tmp_path / "result.json", tmp_path / "models")
    ranks = json.loads((tmp_path / "result.json").read_text())
    for family in families:
        result = [rank[family] for rank in ranks]
        for rank in result:
            facts = [rank[name] for name in ("weights", "names", "buffers", "tied", "head")]
            assert all(facts) and rank["logits"] < 1e-4, (family, rank)
        assert sum(rank["held"] for rank in result) == result[0]["whole"], family
        if family not in CONVERTED:
            assert sum(rank["read"] for rank in result) == result[0]["whole"], family
            assert max(rank["read"] for rank in result) < 0.4 * result[0]["whole"], family

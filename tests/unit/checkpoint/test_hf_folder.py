"""What is written is a Hugging Face folder: over many architectures, in one file or in shards."""

import pytest
import torch
from architectures import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM

from gspo.checkpoint.hf_folder import ModelFolder, index_json, shard_files
from gspo.distributed.world import split_by_size
from gspo.embedded import MODEL_DIR
from gspo.models.loading import load_model, load_tokenizer
from gspo.models.safetensors_files import write_weights


def write(folder, source, weights, tokenizer, shards):
    """As the ranks of a run do it: parameters dealt out, each in the pieces that files have of it."""
    model_folder = ModelFolder(str(source), tokenizer)
    places = {}
    hands = split_by_size({name: x.nbytes for name, x in weights.items()}, shards)
    beside = model_folder.other_files(folder.with_name("scratch"), next(iter(weights.values())).dtype)
    folder.mkdir()
    for name, data in beside.items():
        (folder / name).write_bytes(data)
    for file, hand in zip(shard_files("model", shards), hands, strict=True):
        pieces = {key: x for name in hand for key, x in model_folder.stored_tensors(name, weights[name]).items()}
        write_weights(folder / file, pieces)
        places |= dict.fromkeys(pieces, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_bytes(index_json(0, places))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_model_reopens_with_the_same_logits(family, shards, tmp_path, tokenizer):
    """Parameters of a live model -> folder -> from_pretrained: equal bits, tied heads and single experts included."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "source")
    config = (tmp_path / "source" / "config.json").read_text()
    (tmp_path / "source" / "config.json").write_text(config.replace('"float32"', '"bfloat16"'))  # as published
    weights = {name: p.detach() * 1.01 for name, p in model.named_parameters()}
    write(tmp_path / "export", tmp_path / "source", weights, tokenizer, shards)
    again = load_model(str(tmp_path / "export"))
    assert type(again) is type(model)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").dtype == torch.float32
    for name, p in again.named_parameters():
        assert p.equal(weights[name]), name
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
        ids = torch.randint(2, 97, (2, 9))
        assert again(input_ids=ids).logits.equal(model(input_ids=ids).logits)


def test_experts_have_the_names_of_published_files(tmp_path, tokenizer):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "source")
    model_folder = ModelFolder(str(tmp_path / "source"), tokenizer)
    experts = dict(model.named_parameters())["model.layers.1.mlp.experts.gate_up_proj"]
    names = [f"model.layers.1.block_sparse_moe.experts.{e}.w{w}.weight" for e in range(4) for w in (1, 3)]
    assert sorted(model_folder.stored_tensors("model.layers.1.mlp.experts.gate_up_proj", experts.detach())) == names


def test_generation_settings_and_chat_template_are_kept(tmp_path, tokenizer, embedded_model):
    weights = {name: p.detach() for name, p in embedded_model.named_parameters()}
    write(tmp_path / "export", MODEL_DIR, weights, tokenizer, 1)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert again.generation_config.eos_token_id == embedded_model.generation_config.eos_token_id
    assert again.generation_config.temperature == 0.9 and again.dtype == torch.float32
    assert load_tokenizer(str(tmp_path / "export")).chat_template == tokenizer.chat_template
    assert not (tmp_path / "scratch").exists()


def test_names_are_split_evenly_by_size():
    sizes = {f"layer.{i}": 10 + i % 3 for i in range(22)} | {"embedding": 100, "head": 99}
    names_of_rank = split_by_size(sizes, 4)
    assert sorted(name for names in names_of_rank for name in names) == sorted(sizes)
    total = [sum(sizes[name] for name in names) for names in names_of_rank]
    assert max(total) - min(total) <= 12 and total[0] < 1.1 * sum(total) / 4
    assert split_by_size({"a": 5, "b": 1}, 3) == [["a"], ["b"], []]

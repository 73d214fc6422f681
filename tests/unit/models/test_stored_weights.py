"""Files that do not hold a model's weights, and nothing else, are refused by name, whichever way they are opened."""

import functools
import json
import shutil

import pytest
import torch
from architectures import tiny_model
from safetensors.torch import load_file, save_file

from gspo.distributed.sharded_loading import allocate_and_load, meta_model
from gspo.distributed.sharding import materialize
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.export import export
from gspo.models.loading import check_weights, load_model, load_tokenizer
from gspo.read_config import load_config
from train import train

ALONE = World(0, 1, torch.device("cpu"), None)
WHOLE = functools.partial(materialize, world=ALONE)
WAYS = {  # of opening a model's files: one process; several; --check and the memory report; export
    "one process": load_model,
    "several": lambda path: allocate_and_load(WHOLE, meta_model(path), path),
    "check": functools.partial(check_weights, values=True),
    "export": lambda path: export(path, path.with_name("out")),
}


def change(folder, weights=None, config=None):
    """Rewrite a folder's weights by a function of them, and keys of its config.json."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({k: x.contiguous() for k, x in (weights or dict)(tensors).items()}, file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | (config or {})))
    return folder


def renamed(prefix):
    return lambda w: {prefix + name: x for name, x in w.items()}


def without(part):
    return lambda w: {name: x for name, x in w.items() if part not in name}


def plus(**extra):
    return lambda w: w | {name.replace("__", "."): torch.ones(4, 4) for name in extra}


WRONG = {
    "wrapper of PEFT": ("llama", renamed("base_model.model."), {}, "'base_model.model.', of a wrapper"),
    "wrapper of DDP": ("llama", renamed("module."), {}, "'module.', of a wrapper"),
    "wrapper of torch.compile": ("qwen2", renamed("_orig_mod."), {}, "'_orig_mod.', of a wrapper"),
    "policy inside a trainer": ("qwen3", renamed("actor.model."), {}, "'actor.model.', of a wrapper"),
    "a value model's wrapper, and a head that is tied": (
        "gemma2",
        lambda w: renamed("pretrained_model.")(w) | {"v_head.summary.weight": torch.ones(1, 32)},
        {},
        "'pretrained_model.', of a wrapper",
    ),
    "layers counted from one": (
        "llama",
        lambda w: {k.replace("layers.1.", "layers.2.").replace("layers.0.", "layers.1."): x for k, x in w.items()},
        {},
        "no weights for model.layers.0.input.*holds model.layers.2.input",
    ),
    "compiled layers": (
        "llama",
        lambda w: {name.replace(".self_attn.", ".self_attn._orig_mod."): x for name, x in w.items()},
        {},
        "no weights for model.layers.0.self_attn.k_proj.weight",
    ),
    "a layer left out": ("llama", without("layers.1."), {}, "no weights for model.layers.1.input_layernorm.weight"),
    "no norms": ("qwen2", without("model.norm"), {}, "no weights for model.norm.weight"),
    "more layers in config.json": ("llama", None, {"num_hidden_layers": 3}, "no weights for model.layers.2"),
    "fewer layers in config.json": ("llama", None, {"num_hidden_layers": 1}, "holds model.layers.1.*no place for"),
    "biases asked for": ("llama", None, {"attention_bias": True}, "no weights for .*layers.0.self_attn.k_proj.bias"),
    "biases nobody asked for": ("llama", plus(model__layers__0__mlp__up_proj__bias=1), {}, "holds .*up_proj.bias"),
    "no head": ("llama", without("lm_head"), {}, "no weights for lm_head.weight.*set tie_word_embeddings to true"),
    "a head that is not tied": ("gemma2", None, {"tie_word_embeddings": False}, "no weights for lm_head.weight"),
    "two heads that are tied": ("llama", None, {"tie_word_embeddings": True}, "a head and an embedding that differ"),
    "an expert left out": ("mixtral", without("experts.3.w1"), {}, "experts"),
    "all experts left out": ("mixtral", without("layers.1.block_sparse_moe.experts"), {}, "no weights for .*experts"),
    "no correction of the router": ("deepseek_v3", without("correction_bias"), {}, "no weights .*correction_bias"),
    "another vocabulary": ("llama", None, {"vocab_size": 96}, r"\[97, 32\].*asks for \[96, 32\]"),
    "another width": ("qwen2", None, {"intermediate_size": 64}, r".and 5 more. .* \[32, 48\],.* \[32, 64\]"),
    "a classifier": ("llama", lambda w: without("lm_head")(w) | {"score.weight": torch.ones(1, 32)}, {}, "classifier"),
    "a value head": ("llama", plus(v_head__summary__weight=1), {}, "holds v_head.summary.weight.*value model"),
    "an adapter not merged": (
        "llama",
        plus(base_model__model__model__layers__0__self_attn__q_proj__lora_A__weight=1),
        {},
        "adapter that was not merged",
    ),
    "weights in int8": ("llama", lambda w: {k: x.to(torch.int8) for k, x in w.items()}, {}, "stored as I8"),
    "in float8": ("llama", lambda w: {k: x.to(torch.float8_e5m2) for k, x in w.items()}, {}, "stored as F8_E5M2"),
    "scales of quantised weights": ("llama", plus(model__layers__0__mlp__up_proj__weight_scale=1), {}, "quantised"),
    "GPTQ without its config": (
        "llama",
        lambda w: {k.replace("up_proj.weight", "up_proj.qweight"): x for k, x in w.items()},
        {},
        "quantised",
    ),
    "NaN": ("llama", lambda w: w | {"model.norm.weight": torch.full((32,), torch.nan)}, {}, "norm.weight has 32 of 32"),
    "infinity in half precision": (
        "qwen2",
        lambda w: {k: (x.half() + (torch.inf if "layers.1.mlp" in k else 0)) for k, x in w.items()},
        {},
        r"layers.1.mlp.* \(NaN or infinity\), and so have 2 more tensors",
    ),
    "infinities of both signs": (
        "llama",
        lambda w: w | {"lm_head.weight": torch.linspace(-1, 1, 97)[:, None].expand(97, 32).sign() / 0},
        {},
        "lm_head.weight has 3,104 of 3,104",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_files_that_are_not_the_models_weights_are_refused_whichever_way_they_are_opened(wrong, tmp_path):
    family, weights, config, why = WRONG[wrong]
    tiny_model(family, **({"first_k_dense_replace": 0} if family == "deepseek_v3" else {})).save_pretrained(
        tmp_path / "m"
    )
    change(tmp_path / "m", weights, config)
    for way, opened in WAYS.items():
        with pytest.raises(UserError, match=why) as refused:
            opened(tmp_path / "m")
        assert "model.path" in str(refused.value) and "\n" not in str(refused.value), way
    assert not (tmp_path / "out").exists()


FINE = {
    "rotary frequencies of an older version": ("llama", plus(model__layers__0__self_attn__rotary_emb__inv_freq=1), {}),
    "one head, twice": ("gemma2", lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()}, {}),
    "no prefix of the base model": ("llama", lambda w: {k.removeprefix("model."): x for k, x in w.items()}, {}),
    "causal masks": ("gpt_neox", plus(gpt_neox__layers__0__attention__bias=1), {}),
    "double precision": ("qwen2", lambda w: {k: x.double() for k, x in w.items()}, {}),
}


@pytest.mark.parametrize("fine", FINE)
def test_ties_and_known_buffers_may_be_stored_or_not(fine, tmp_path):
    family, weights, config = FINE[fine]
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "m")
    change(tmp_path / "m", weights, config)
    for way, opened in WAYS.items():
        found = opened(tmp_path / "m")
        if way in ("one process", "several"):
            assert all(p.equal(q) for p, q in zip(found.parameters(), model.parameters(), strict=True)), way


@pytest.mark.parametrize("wrong", ["a layer left out", "NaN", "weights in int8", "a value head"])
@pytest.mark.parametrize("check_only", [True, False])
def test_a_run_ends_before_its_folder_is_made(wrong, check_only, tmp_path):
    """With --check and without."""
    family, weights, config, why = WRONG[wrong]
    tiny_model(family, vocab_size=352).save_pretrained(tmp_path / "m")
    load_tokenizer(None).save_pretrained(tmp_path / "m")
    change(tmp_path / "m", weights, config)
    flags = [f"model.path={tmp_path / 'm'}", f"trainer.output_dir={tmp_path / 'out'}", "data.train_files=embedded"]
    with pytest.raises(UserError, match=why):
        train(load_config(None, [*flags, "rollout.max_new_tokens=16", "data.max_prompt_length=64"]), ALONE, check_only)
    assert not (tmp_path / "out").exists()


def test_layers_that_predict_later_tokens_are_left_out_and_said(tmp_path, capsys):
    tiny_model("deepseek_v3", first_k_dense_replace=0).save_pretrained(tmp_path / "m")
    layer = {"model.layers.2.eh_proj.weight": torch.ones(4, 4)}
    change(tmp_path / "m", lambda w: w | layer, {"num_nextn_predict_layers": 1})
    load_model(tmp_path / "m")
    assert "layers.2.eh_proj.weight: transformers' class has no place for it" in capsys.readouterr().out


def test_a_cast_that_makes_weights_infinite_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    change(tmp_path / "m", lambda w: w | {"model.norm.weight": torch.full((32,), 1e6)})
    with pytest.raises(UserError, match="model.norm.weight has values that float16 cannot hold"):
        export(tmp_path / "m", tmp_path / "out", torch.float16)
    export(tmp_path / "m", tmp_path / "out", torch.bfloat16)


def test_pickled_weights_are_compared_as_well(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    stored = model.state_dict()
    for name, why in {
        "model.norm.weight": "no weights for model.norm",
        "": "a head and an embedding that differ",
    }.items():
        torch.save({k: x for k, x in stored.items() if k != name}, tmp_path / "m" / "pytorch_model.bin")
        change_config = {} if name else {"tie_word_embeddings": True}
        settings = json.loads((tmp_path / "m" / "config.json").read_text()) | change_config
        (tmp_path / "m" / "config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=why):
            load_model(tmp_path / "m")


@pytest.mark.parametrize("way", WAYS)
def test_matrices_of_zeros_are_said_once_whichever_way_they_are_opened(way, tmp_path, capsys):
    """A broken export leaves them; a bias may be zero, and so may the norms of some families."""
    tiny_model("llama", attention_bias=True).save_pretrained(tmp_path / "m")
    load_tokenizer(None).save_pretrained(tmp_path / "m")
    whole = {k: x * 0 if x.ndim == 1 else x for k, x in load_file(tmp_path / "m" / "model.safetensors").items()}
    change(tmp_path / "m", lambda w: whole)
    WAYS[way](tmp_path / "m")
    assert "all weights are 0" not in capsys.readouterr().out
    names = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("down", "up")]
    broken = shutil.copytree(tmp_path / "m", tmp_path / "broken")
    change(broken, lambda w: w | {name: w[name] * 0 for name in names})
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    for _ in range(1 if way == "export" else 2):
        WAYS[way](broken)
    said = capsys.readouterr().out
    assert said.count(f"warning: {broken}: {', '.join(names)}: all weights are 0") == 1

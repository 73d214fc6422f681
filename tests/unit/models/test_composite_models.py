"""Models whose configuration holds one for text: the decoder of text is found, sharded, recomputed and measured."""

import copy
import functools
import json

import pytest
import torch
from architectures import COMPOSITE, SMALL, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from gspo.distributed.sharded_loading import allocate_and_load, meta_model
from gspo.distributed.sharding import materialize, sharding_units
from gspo.distributed.tensor_parallel import check_tensor_parallel
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.memory.footprint import footprint
from gspo.models.loading import checkpoint_activations, decoder_layers, load_model, load_model_config, text_decoder
from gspo.packing.logprobs import check_packing, response_logprobs
from gspo.packing.pack import pack
from gspo.packing.probe_head import measure_head
from gspo.read_config import load_config
from gspo.rollout.decoder_stack import stack_serves
from gspo.rollout.slot_attention import check_slots
from gspo.types import Prompt

CPU = torch.device("cpu")
WHOLE = functools.partial(materialize, world=World(0, 1, CPU, None))


@pytest.mark.parametrize("family", COMPOSITE)
def test_the_decoder_of_text_is_found_and_never_a_tower_as_deep(family):
    model = tiny_model(family)
    layers, decoder = decoder_layers(model), text_decoder(model)
    assert len(layers) == 2 and all(layer in set(decoder.modules()) for layer in layers)
    assert not any("vision" in name and module is layers for name, module in model.named_modules())
    assert all(hasattr(layer, "self_attn") and hasattr(layer, "input_layernorm") for layer in layers)
    assert set(layers) <= set(sharding_units(model))


def test_a_layer_with_as_many_experts_as_there_are_layers_is_no_decoder():
    layers = decoder_layers(tiny_model("phimoe", num_local_experts=2, num_experts_per_tok=1, num_hidden_layers=2))
    assert "DecoderLayer" in type(layers[0]).__name__


@pytest.mark.parametrize("family", COMPOSITE)
def test_packs_and_slots_serve_it(family):
    model = tiny_model(family)
    check_packing(model, measure_head(model))
    check_slots(model, CPU)
    stack_serves(model)


@pytest.mark.parametrize("family", COMPOSITE)
def test_its_files_are_opened_alike_by_one_process_and_several(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    plain = load_model(str(tmp_path))
    mine = allocate_and_load(WHOLE, meta_model(str(tmp_path)), str(tmp_path))
    assert all(p.equal(q) for p, q in zip(mine.parameters(), plain.parameters(), strict=True))
    ids = torch.randint(2, 97, (2, 9))
    with torch.no_grad():
        assert mine(input_ids=ids).logits.equal(plain(input_ids=ids).logits)


@pytest.mark.parametrize("family", COMPOSITE)
def test_recomputed_activations_give_the_same_gradient(family):
    plain = tiny_model(family)
    recomputing = copy.deepcopy(plain)
    calls = []
    checkpoint_activations(recomputing)
    head = measure_head(plain)
    for layer in decoder_layers(recomputing):
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    packed = pack([Prompt(0, (5, 7, 9), "", "", "")], [0, 0], torch.randint(2, 97, (2, 6)), torch.tensor([6, 6]))
    for model in (plain, recomputing):
        response_logprobs(model, head, packed, 1.0).sum().backward()
    assert len(calls) == 4, "two layers, twice"
    for p, q in zip(decoder_layers(plain).parameters(), decoder_layers(recomputing).parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("family", COMPOSITE)
def test_its_memory_is_reported(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    flags = [f"model.path={tmp_path}", "model.gradient_checkpointing=true", "rollout.n=4", "data.max_prompt_length=48"]
    cfg = load_config(None, [*flags, "rollout.max_new_tokens=64", "data.train_batch_size=8"])
    for ranks in (1, 2):
        report = footprint(cfg, ranks, "cpu", "fp32", 2**30)
        assert report.phases["sampling"]["KV cache"] > 0 and report.phases["updating"]["activations"] > 0
        assert (report.phases["updating"]["gathered layers"] > 0) == (ranks == 2)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "t5", "clip"])
def test_what_has_no_decoder_of_text_is_refused_in_words(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(UserError, match=f"of the type {family}, for which transformers has no causal language model"):
        load_model_config(str(tmp_path))


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 97, "max_seq_len": 64}),
        ("falcon", {**SMALL, "alibi": True}),
        ("bloom", {**SMALL, "n_head": 4}),
    ],
)
def test_models_that_cannot_be_run_are_refused_by_name_and_without_a_traceback(family, given):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    with pytest.raises(UserError, match=f"architecture, {family}"):
        check_packing(model, measure_head(model))
    with pytest.raises(UserError, match=f"architecture, {family}"):
        check_slots(model, CPU)


def test_a_model_without_a_list_of_layers_is_refused_where_layers_are_needed():
    model = tiny_model("llama")
    model.config.num_hidden_layers = 3
    with pytest.raises(UserError, match="LlamaForCausalLM .llama. has no list of 3 decoder layers.*one process"):
        checkpoint_activations(model)


def test_tensor_parallel_plans_are_those_of_the_text(tmp_path):
    tiny_model("gemma3").save_pretrained(tmp_path)
    config = load_model_config(str(tmp_path))
    check_tensor_parallel(config, 2, 2)
    with pytest.raises(UserError, match="4 attention heads, 2 key-value heads"):
        check_tensor_parallel(config, 4, 4)

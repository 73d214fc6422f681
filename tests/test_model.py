"""Opening and exporting models, over many architectures."""

import pytest
import torch
from architectures import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from gspo.errors import UserError
from gspo.model import (
    architecture,
    decoder_layers,
    generation_ids,
    in_dtype,
    load_model,
    load_tokenizer,
    save_pretrained,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_reopens_with_the_same_logits(family, tmp_path, tokenizer):
    """Named parameters of a live model -> folder -> from_pretrained: equal bits, tied heads included."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "source")
    config = (tmp_path / "source" / "config.json").read_text()
    (tmp_path / "source" / "config.json").write_text(config.replace('"float32"', '"bfloat16"'))  # as published
    weights = {name: p.detach() * 1.01 for name, p in model.named_parameters()}
    save_pretrained(tmp_path / "export", str(tmp_path / "source"), weights, tokenizer)
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


def test_an_export_keeps_the_generation_settings_and_the_chat_template(tmp_path, tokenizer, embedded_model):
    from gspo.embedded import MODEL_DIR

    save_pretrained(tmp_path, str(MODEL_DIR), dict(embedded_model.named_parameters()), tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.eos_token_id == embedded_model.generation_config.eos_token_id
    assert again.generation_config.temperature == 0.9 and again.dtype == torch.float32
    assert load_tokenizer(str(tmp_path)).chat_template == tokenizer.chat_template


def test_every_end_of_sequence_id_is_known(tokenizer):
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    ends, pad = generation_ids(model, tokenizer)
    assert ends == {7, 9, 1} and pad == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_layers_are_found(family):
    layers = decoder_layers(tiny_model(family))
    assert len(layers) == 2 and "Layer" in type(layers[0]).__name__


def test_what_is_no_model_is_refused_by_name(tmp_path):
    for make in (load_model, load_tokenizer, architecture):
        with pytest.raises(UserError, match="nothing-here"):
            make(str(tmp_path / "nothing-here"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be opened"):
        load_model(str(tmp_path))


def test_a_cast_model_is_the_one_that_transformers_opens_in_that_dtype(tmp_path):
    """Rotary frequencies stay in float32, as `from_pretrained(dtype=...)` leaves them: the same logits, bit for bit."""
    opened = load_model(None, torch.bfloat16)
    cast = in_dtype(load_model(None), torch.bfloat16)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert cast(input_ids=ids).logits.equal(opened(input_ids=ids).logits)
    assert cast.lm_head.weight is cast.model.embed_tokens.weight
    assert not load_model(None).to(torch.bfloat16)(input_ids=ids).logits.equal(opened(input_ids=ids).logits)

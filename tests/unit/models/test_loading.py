"""Opening and exporting models, over many architectures."""

import pytest
import torch
from architectures import FAMILIES, tiny_model
from transformers import GenerationConfig

from gspo.errors import UserError
from gspo.models.loading import (
    architecture,
    cast_parameters,
    decoder_layers,
    end_and_pad_ids,
    load_model,
    load_tokenizer,
)


def test_every_end_of_sequence_id_is_known(tokenizer):
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    ends, pad = end_and_pad_ids(model, tokenizer)
    assert ends == {7, 9, 1} and pad == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_layers_are_found(family):
    layers = decoder_layers(tiny_model(family))
    assert len(layers) == 2 and "Layer" in type(layers[0]).__name__


def test_a_folder_without_a_model_is_refused_by_name(tmp_path):
    for make in (load_model, load_tokenizer, architecture):
        with pytest.raises(UserError, match="nothing-here"):
            make(str(tmp_path / "nothing-here"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be opened"):
        load_model(str(tmp_path))


def test_a_cast_model_is_the_one_that_transformers_opens_in_that_dtype(tmp_path):
    """Rotary frequencies stay in float32, as `from_pretrained(dtype=...)` leaves them: the same logits, bit for bit."""
    opened = load_model(None, torch.bfloat16)
    cast = cast_parameters(load_model(None), torch.bfloat16)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert cast(input_ids=ids).logits.equal(opened(input_ids=ids).logits)
    assert cast.lm_head.weight is cast.model.embed_tokens.weight
    assert not load_model(None).to(torch.bfloat16)(input_ids=ids).logits.equal(opened(input_ids=ids).logits)

"""Settings of generation_config.json: what transformers can save is kept, the rest is named."""

import json
import shutil

import pytest
from transformers import GenerationConfig

from gspo.checkpoint.hf_folder import ModelFolder
from gspo.distributed.sharded_loading import meta_model
from gspo.embedded import MODEL_DIR
from gspo.errors import UserError
from gspo.models.generation import valid_settings
from gspo.models.loading import check_weights, end_and_pad_ids, load_model, load_tokenizer

GREEDY = {"eos_token_id": [1, 7], "max_new_tokens": 99}
DROPPED = {  # what is in the file beside GREEDY -> what is left out of checkpoints
    "several sequences, greedily": ({"num_return_sequences": 4}, {"num_return_sequences"}),
    "more sequences than beams": ({"num_beams": 2, "num_return_sequences": 4}, {"num_return_sequences"}),
    "no such cache": ({"cache_implementation": "quick", "top_k": 5}, {"cache_implementation"}),
    "a negative length": ({"max_new_tokens": -1}, {"max_new_tokens"}),
    "no such early stopping": ({"early_stopping": "soon"}, {"early_stopping"}),
    "a list of watermarks": ({"watermarking_config": [1]}, {"watermarking_config"}),
}
KEPT = {
    "several sequences, sampled": {"num_return_sequences": 4, "do_sample": True},
    "in the other order": {"do_sample": True, "num_return_sequences": 4, "top_p": 0.9},
    "a temperature that is not used": {"temperature": 0.6, "do_sample": False},
    "an unknown setting": {"our_own": {"a": 1}},
}


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(MODEL_DIR, tmp_path / "m")


def write(folder, settings):
    (folder / "generation_config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))


@pytest.mark.parametrize("case", DROPPED)
def test_what_transformers_refuses_is_left_out_and_named_and_the_rest_is_saved(
    case, folder, tokenizer, tmp_path, capsys
):
    more, dropped = DROPPED[case]
    write(folder, GREEDY | more)
    for opened in (load_model, meta_model):
        assert end_and_pad_ids(opened(str(folder)), tokenizer)[0] >= {1, 7}
    said = capsys.readouterr().out
    assert said.count("left out of checkpoints") == 1 and all(f"{name} = " in said for name in dropped)
    files = ModelFolder(str(folder), tokenizer).other_files(tmp_path / "scratch", load_model(None).dtype)
    saved = json.loads(files["generation_config.json"])
    kept = {name: x for name, x in (GREEDY | more).items() if name not in dropped}
    assert {name: saved.get(name) for name in kept} == kept and not dropped & saved.keys()


@pytest.mark.parametrize("case", KEPT)
def test_what_can_be_saved_is_kept_without_a_word(case, folder, tokenizer, tmp_path, capsys):
    write(folder, GREEDY | KEPT[case])
    files = ModelFolder(str(folder), tokenizer).other_files(tmp_path / "scratch", load_model(str(folder)).dtype)
    saved = json.loads(files["generation_config.json"])
    assert {name: saved[name] for name in KEPT[case]} == KEPT[case]
    assert "left out" not in capsys.readouterr().out


def test_settings_that_fit_only_together_are_kept_together():
    settings = {"num_return_sequences": 2, "num_beams": 2, "max_new_tokens": -3}
    assert valid_settings(settings)[0] == {"num_return_sequences": 2, "num_beams": 2}
    GenerationConfig(**valid_settings(settings)[0])


@pytest.mark.parametrize(("text", "why"), [("{bad", "cannot be read as JSON"), ("[]", "must hold a JSON object")])
def test_a_damaged_file_is_refused(text, why, folder):
    """Its end tokens would be missed."""
    write(folder, text)
    for opened in (load_model, meta_model):
        with pytest.raises(UserError, match=f"generation_config.json {why}"):
            opened(str(folder))


@pytest.mark.parametrize("value", ["2", [1, "<|end|>"], 1.0, True])
def test_end_tokens_that_are_no_numbers_are_refused(value, folder, embedded_model):
    tokenizer = load_tokenizer(None)
    embedded_model.generation_config.eos_token_id = value
    with pytest.raises(
        UserError, match="eos_token_id = .* in the model's generation_config.json: .* is no whole number"
    ):
        end_and_pad_ids(embedded_model, tokenizer)
    write(folder, {"eos_token_id": value})
    with pytest.raises(UserError, match="no whole number"):
        check_weights(str(folder))


def test_the_end_token_of_a_text_config_counts(embedded_model, tokenizer):
    embedded_model.config.get_text_config().eos_token_id = [5, -1]
    assert end_and_pad_ids(embedded_model, tokenizer)[0] == {1, 5}


@pytest.mark.parametrize("value", [352, [1, 999_999], 10**12])
def test_end_tokens_that_the_model_does_not_have_are_refused(value, folder):
    write(folder, {"eos_token_id": value})
    for opened in (load_model, check_weights, meta_model):
        with pytest.raises(UserError, match=r"eos_token_id = .* in the model's generation_config.json: .* 352 tokens"):
            model = opened(str(folder))
            end_and_pad_ids(model, load_tokenizer(None))
    write(folder, {"eos_token_id": 351})
    check_weights(str(folder))

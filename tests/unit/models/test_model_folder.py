"""Folders that are no model to train are refused in words before anything opens them, and nothing is ever asked."""

import json
import shutil

import pytest

from gspo.distributed.sharded_loading import meta_model
from gspo.embedded import MODEL_DIR
from gspo.errors import UserError
from gspo.models.loading import architecture, check_weights, load_model, load_model_config, load_tokenizer
from gspo.sample import sample

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12\n"


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model, to be spoiled."""
    return shutil.copytree(MODEL_DIR, tmp_path / "m")


@pytest.mark.parametrize("name", ["qwen2.5", "./owner/name", "/no/such/folder", "a/b/c"])
def test_a_name_that_is_no_folder_and_cannot_be_on_the_hub_is_refused_at_once(name, capsys):
    with pytest.raises(
        UserError, match=rf"model.path = '{name}' is no folder here, and a name on the hub is OWNER/NAME"
    ):
        load_model_config(name)
    assert capsys.readouterr().out == ""


def test_that_the_hub_is_asked_is_said_once(capsys):
    for _ in range(2):
        with pytest.raises(UserError, match="is no folder here and cannot be fetched"):
            load_model_config("owner/not-fetched")
    assert capsys.readouterr().out == "no folder owner/not-fetched here; asking the hub\n"


def test_a_mistyped_name_in_a_folder_that_is_here_does_not_ask_the_hub(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent.parent)
    here = folder.parent.name
    (folder.parent / "SmolLM2-135M").mkdir()
    with pytest.raises(UserError, match=f"is no folder here: {here} is a folder here, and has no 'SmolLM-135M'") as e:
        load_model_config(f"{here}/SmolLM-135M")
    assert f"do you mean {here}/SmolLM2-135M?" in str(e.value) and f"`hf download {here}/SmolLM-135M`" in str(e.value)
    assert capsys.readouterr().out == ""


def test_a_mistyped_folder_is_named_by_those_beside_it(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "Qwen2.5-0.5B").mkdir()
    for given, said in {
        "Qwen2.5-0.5": r"leave it empty. Is Qwen2.5-0.5B meant\?",
        str(folder.parent / "qwen2.5-0.5B"): f"Is {folder.parent}/Qwen2.5-0.5B meant",
        "./nosuch/a/b": "There is no folder ./nosuch/a.",
    }.items():
        with pytest.raises(UserError, match=said):
            load_model_config(given)


@pytest.mark.parametrize("inside", [True, False])
def test_a_base_of_positions_that_is_null_is_named(folder, inside):
    """It stands under one of two names, and where it stands under both, one may be null."""
    config = json.loads((folder / "config.json").read_text())
    write(folder, "config.json", {**config, "rope_theta": None})
    load_model(str(folder))
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": None} if inside else None
    write(folder, "config.json", {**config, "rope_theta": None} if not inside else config)
    for opened in (load_model, check_weights):
        with pytest.raises(UserError, match="rope_theta is null in its config.json. Write the model's own"):
            opened(str(folder))


def test_a_folder_is_never_looked_for_on_the_hub(folder, monkeypatch):
    """Its relative name could be one of the hub's."""
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *host: asked.append(host) or 1 / 0)
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/m"
    assert load_model(name) is not None and load_tokenizer(name) is not None
    add(folder, "config.json", model_type="of_tomorrow")
    with pytest.raises(UserError, match="cannot be opened as a model folder.*of_tomorrow"):
        load_model_config(name)
    assert asked == []


def remove(folder, *names):
    for name in names:
        (folder / name).unlink()


def write(folder, name, text):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))


def add(folder, name, **more):
    write(folder, name, json.loads((folder / name).read_text()) | more)


def an_adapter(folder):
    remove(folder, "config.json", "model.safetensors")
    write(folder, "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-0.5B"})


def an_adapter_without_its_config(folder):
    remove(folder, "config.json")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def a_pointer_of_several(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    write(folder, "model-00002-of-00002.safetensors", POINTER)


def quantised(method):
    return lambda folder: add(folder, "config.json", quantization_config={"quant_method": method, "bits": 4})


OWN_CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
MODELS = {
    "an adapter": (an_adapter, "is an adapter of Qwen/Qwen2.5-0.5B, not a whole model.*merge_and_unload"),
    "an adapter without its config": (an_adapter_without_its_config, "is an adapter, not a whole model"),
    "prompt tuning": (
        lambda f: (an_adapter(f), write(f, "adapter_config.json", {"peft_type": "PROMPT_TUNING"})),
        "is an adapter",
    ),
    "an adapter in a model": (
        lambda f: write(f, "adapter_config.json", {}),
        "a model and beside it an adapter.*Merge it",
    ),
    "its weights are a pointer": (
        lambda f: write(f, "model.safetensors", POINTER),
        "model.safetensors only as a git-lfs pointer.*git lfs pull",
    ),
    "one file of two is a pointer": (
        a_pointer_of_several,
        "model-00002-of-00002.safetensors only as a git-lfs pointer",
    ),
    "its config is a pointer": (lambda f: write(f, "config.json", POINTER), "config.json only as a git-lfs pointer"),
    "pickled weights are a pointer": (
        lambda f: (remove(f, "model.safetensors"), write(f, "pytorch_model.bin", POINTER)),
        "pytorch_model.bin only as",
    ),
    "empty weights": (lambda f: write(f, "model.safetensors", ""), "model.safetensors with nothing in it"),
    "a web page": (
        lambda f: write(f, "model.safetensors", "<!DOCTYPE html>" + 2000 * " "),
        "model.safetensors is no whole safetensors file",
    ),
    "no weights": (lambda f: remove(f, "model.safetensors"), "has no weights: no model.safetensors"),
    "a file that the index names is not there": (
        lambda f: (
            remove(f, "model.safetensors"),
            write(f, "model.safetensors.index.json", {"weight_map": {"x": "y.safetensors"}}),
        ),
        "names y.safetensors, which is not there",
    ),
    "two sets of weights": (
        lambda f: (
            shutil.copy(f / "model.safetensors", f / "other.safetensors"),
            write(f, "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "other.safetensors"}}),
        ),
        "has model.safetensors and beside it model.safetensors.index.json of other files",
    ),
    "GPTQ": (quantised("gptq"), "quantised weights .quantization_config in config.json: gptq.*as it was before"),
    "AWQ": (quantised("awq"), "quantised weights .*: awq"),
    "bitsandbytes": (quantised("bitsandbytes"), "quantised weights .*: bitsandbytes"),
    "float8": (quantised("fp8"), "quantised weights .*: fp8"),
    "float8 in config.json": (
        lambda f: add(f, "config.json", dtype="float8_e4m3fn"),
        "has dtype = 'float8_e4m3fn' in its config.json.*write that type there.*dequantize them",
    ),
    "int8 by the older name": (
        lambda f: add(f, "config.json", dtype=None, torch_dtype="torch.int8"),
        "has torch_dtype = 'torch.int8' in its config.json",
    ),
    "no dtype": (lambda f: add(f, "config.json", text_config={"dtype": 7}), "has dtype = 7 in its config.json"),
    "MLX": (
        lambda f: add(f, "config.json", quantization={"group_size": 64, "bits": 4}),
        "quantised weights .quantization in",
    ),
    "quantised inside": (
        lambda f: add(f, "config.json", text_config={"quantization_config": {"quant_method": "mxfp4"}}),
        "quantised weights .*: mxfp4",
    ),
    "GGUF": (
        lambda f: (remove(f, "config.json"), write(f, "m-q4.gguf", "GGUF")),
        "holds m-q4.gguf: GGUF files are for inference",
    ),
    "code of its own": (
        lambda f: add(f, "config.json", model_type="x", auto_map=OWN_CODE),
        "Python code of its own .modeling_x.py., which is never run",
    ),
    "code of somebody else": (
        lambda f: add(f, "config.json", model_type="x", auto_map={"AutoConfig": "who/repo--configuration_y.Y"}),
        "needs Python code of its own .configuration_y.py",
    ),
    "code and no type": (lambda f: write(f, "config.json", {"auto_map": OWN_CODE}), "needs Python code of its own"),
    "an unknown type": (lambda f: add(f, "config.json", model_type="x"), "model type `x`"),
    "no decoder": (
        lambda f: add(f, "config.json", model_type="bert_japanese_x", architectures=["X"]),
        "cannot be opened",
    ),
    "an encoder": (
        lambda f: write(f, "config.json", {"model_type": "vit"}),
        "of the type vit, for which transformers has no causal",
    ),
    "half a config": (lambda f: write(f, "config.json", "{"), "config.json cannot be read as JSON"),
    "a key twice in its config": (
        lambda f: write(f, "config.json", '{"vocab_size": 1, "vocab_size": 2}'),
        "config.json: key 'vocab_size' is given twice in one object.*Leave one out",
    ),
    "a list as config": (lambda f: write(f, "config.json", []), "config.json must hold a JSON object"),
    "checkpoints of a trainer": (
        lambda f: (
            remove(f, "config.json"),
            write(f, "checkpoint-100/config.json", {}),
            write(f, "checkpoint-200/config.json", {}),
        ),
        "no config.json, but 2 of its folders do. Give one: '.*checkpoint-200'",
    ),
    "a folder of ours": (
        lambda f: (
            remove(f, "config.json"),
            (f / "checkpoints").mkdir(),
            write(f, "checkpoints/step_000004/config.json", {}),
        ),
        "Give one: '.*checkpoints/step_000004'",
    ),
}


@pytest.mark.parametrize("spoiled", MODELS)
def test_what_is_no_model_to_train_is_refused_in_words(spoiled, folder):
    spoil, why = MODELS[spoiled]
    spoil(folder)
    for opened in (check_weights, load_model):
        with pytest.raises(UserError, match=why) as refused:
            opened(str(folder))
        assert "trust_remote_code" not in str(refused.value) and str(folder) in str(refused.value)


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "b"}, "is an adapter of b, not a whole model"),
        ("config.json", {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "quantised weights"),
        ("config.json", {"model_type": "x", "auto_map": OWN_CODE}, "needs Python code of its own"),
    ],
)
def test_names_on_the_hub_are_checked_by_what_was_fetched(file, content, why, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--who--what"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots").mkdir()
    write(cache / "snapshots", f"abc/{file}", content)
    with pytest.raises(UserError, match=f"'who/what' .*{why}"):
        load_model_config("who/what")


def test_a_file_is_not_taken_for_its_folder(folder):
    with pytest.raises(UserError, match="is a file. Give the folder that it lies in, '.*/m'"):
        load_model_config(str(folder / "model.safetensors"))


TOKENIZERS = {
    "none": (
        lambda f: remove(f, "tokenizer.json", "tokenizer_config.json"),
        "has no tokenizer .no tokenizer.json.*ORIGINAL",
    ),
    "only its settings": (lambda f: remove(f, "tokenizer.json"), "has no tokenizer .no tokenizer.json"),
    "a pointer": (lambda f: write(f, "tokenizer.json", POINTER), "tokenizer.json only as a git-lfs pointer"),
    "a pointer for sentencepiece": (
        lambda f: write(f, "tokenizer.model", POINTER),
        "tokenizer.model only as a git-lfs pointer",
    ),
    "empty": (lambda f: write(f, "tokenizer.json", ""), "tokenizer.json with nothing in it"),
    "damaged": (lambda f: write(f, "tokenizer.json", "{}" + 2000 * " "), "no tokenizer that transformers can open"),
    "code of its own": (
        lambda f: add(
            f, "tokenizer_config.json", tokenizer_class="X", auto_map={"AutoTokenizer": ["tokenization_x.X", None]}
        ),
        "needs Python code of its own .tokenization_x.py",
    ),
    "fast code of its own": (
        lambda f: add(
            f, "tokenizer_config.json", tokenizer_class="X", auto_map={"AutoTokenizer": [None, "tokenization_f.X"]}
        ),
        "needs Python code of its own .tokenization_f.py",
    ),
}


@pytest.mark.parametrize("spoiled", TOKENIZERS)
def test_a_folder_without_a_tokenizer_is_refused_in_words(spoiled, folder):
    spoil, why = TOKENIZERS[spoiled]
    spoil(folder)
    with pytest.raises(UserError, match=why):
        load_tokenizer(str(folder))


def test_half_an_adapter_is_refused_before_its_tokenizer_is_missed(folder):
    an_adapter(folder)
    remove(folder, "tokenizer.json")
    with pytest.raises(UserError, match="does not name its base, rank and alpha"):
        sample(str(folder), ["Solve: x = 1"])


def test_code_beside_a_known_architecture_is_not_run_and_that_is_said(folder, capsys):
    (folder / "modeling_x.py").write_text("raise SystemExit('was run')")
    add(folder, "config.json", auto_map=OWN_CODE)
    load_model(str(folder))
    assert "its own modeling_x.py is never run; transformers' own class for its model_type" in capsys.readouterr().out


def test_nobody_is_asked_whether_to_run_code(folder, monkeypatch):
    """Also with code that is there, and at a terminal that would answer."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    (folder / "configuration_x.py").write_text("raise SystemExit('was run')")
    (folder / "tokenization_x.py").write_text("raise SystemExit('was run')")
    add(folder, "config.json", model_type="x", auto_map=OWN_CODE)
    add(folder, "tokenizer_config.json", tokenizer_class="X", auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    for opened in (load_model, load_model_config, load_tokenizer, architecture, check_weights, meta_model):
        with pytest.raises(UserError, match="needs Python code of its own"):
            opened(str(folder))
    assert not asked

"""A chat template from a file stands in for the model's own and is saved with it; mistakes in it are named."""

import json

import pytest

from gspo.checkpoint.hf_folder import ModelFolder
from gspo.data.encoding import encode
from gspo.embedded import MODEL_DIR
from gspo.errors import UserError
from gspo.launch_checks import first_prompt
from gspo.models.loading import load_model, load_tokenizer
from gspo.read_config import load_config
from gspo.types import Prompt

TEMPLATE = "{% for m in messages %}Q: {{ m.content }}\nA:{% endfor %}"
ASKED = [{"role": "user", "content": "1 + 1?"}]


@pytest.fixture()
def file(tmp_path):
    """Write a template -> its path."""

    def file(text=TEMPLATE):
        (tmp_path / "t.jinja").write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / "t.jinja")

    return file


def test_it_is_used_and_saved_with_a_checkpoint(file, tmp_path):
    tokenizer = load_tokenizer(None, file())
    assert tokenizer.decode(encode(ASKED, tokenizer, None, {})) == "Q: 1 + 1?\nA:"
    files = ModelFolder(str(MODEL_DIR), tokenizer).other_files(tmp_path / "scratch", load_model(None).dtype)
    kept = files.get("chat_template.jinja") or json.loads(files["tokenizer_config.json"])["chat_template"].encode()
    assert kept.decode() == TEMPLATE
    assert load_tokenizer(None).chat_template != TEMPLATE


def test_a_path_may_begin_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(None, ["data.chat_template=~/t.jinja"]).data.chat_template == "/home/me/t.jinja"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for m in messages %}", "line 1: no Jinja template: Unexpected end of template"),
        ("{% for m in messages %}\n{{ m. }}{% endfor %}", "line 2: no Jinja template"),
        ("Hello.", "never reads `messages`"),
        ("", "never reads `messages`"),
        (b"\xff\xfe", "it is not UTF-8 text. Give a file with a Jinja template"),
    ],
)
def test_what_is_no_template_is_refused(file, text, said):
    with pytest.raises(UserError, match=f"data.chat_template = '.*t.jinja'.*{said}"):
        load_tokenizer(None, file(text))


@pytest.mark.parametrize("path", ["/no/such.jinja", "/tmp", "{{ messages }}"])
def test_what_is_no_file_is_refused(path):
    with pytest.raises(UserError, match="data.chat_template = .*(No such file|Is a directory).*Give a file"):
        load_tokenizer(None, path)


def test_a_template_may_refuse_what_no_row_has(file):
    """As many do for a conversation that the first check makes up."""
    load_tokenizer(None, file("{{ raise_exception('no') if messages[0].content == 'x' else messages }}"))


def test_the_first_prompt_is_shown_as_the_model_reads_it(file):
    tokenizer = load_tokenizer(None, file())
    ids = tuple(encode(ASKED, tokenizer, None, {}))
    said = first_prompt([Prompt(0, ids, "", "", "")], tokenizer)
    assert said == f"first prompt, as the model reads it ({len(ids)} tokens):\n    Q: 1 + 1?\n    A:"
    ids = tuple(tokenizer("7" * 5000)["input_ids"])
    assert " ... " in (said := first_prompt([Prompt(0, ids, "", "", "")], tokenizer)) and len(said) < 1000
    tokenizer.chat_template = None
    said = first_prompt([Prompt(0, ids[:4], "", "", "")], tokenizer)
    assert "there is no chat template: data.chat_template=FILE gives one" in said

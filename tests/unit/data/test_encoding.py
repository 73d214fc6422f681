"""The bound on a prompt's number of tokens: never too low, and found without tokenizing."""

import copy
import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gspo.data.encoding import SLACK, Encoder, encode, ids_per_byte
from gspo.errors import UserError

NASTY = [
    "x",
    "解方程：x + 5 = 12，求 x。" * 7,
    "🧮🤦🏽‍♂️🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "ﷺ ﷻ 𝅘𝅥𝅯 ﬁ Ǆ ½ ㎒ क़ \u0344 \U0001d160",
    "Å" * 30 + "A\u030a" * 30,
    "\u200b\u00ad\ufeff\u2028 \u3000",
    "".join(map(chr, range(1, 0x300))),
    "".join(map(chr, range(0xFB00, 0xFB50))) + "".join(map(chr, range(0x1D150, 0x1D170))),
    "𐍈𒀀𓀀𝔘𝔫𝔦𠜎" * 11,
    "\x00\x01\x7f\t\r\n",
    "<|user|><|assistant|><|pad|> <|end|>",
    "12345678901234567890" * 9,
]


def user(text, role="user"):
    return [{"role": role, "content": text}]


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("system", [None, "Sei kurz. 简短。"])
def test_the_bound_holds_for_the_embedded_tokenizer(tokenizer, text, system):
    encoder = Encoder(tokenizer, system)
    for messages in (user(text), user(text) + user("ok", "assistant") + user(text)):
        length = len(encoder.ids(messages, "here"))
        assert length <= encoder.bound(messages, "here") <= length + 8 * len(text.encode()) + 100


def other(normalizer=None, pre=None, **options):
    """A byte-level BPE of single bytes, the worst case, behind a normalizer and a pre-tokenizer."""
    vocab = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "▁"])}
    backend = Tokenizer(models.BPE(vocab, [], **options))
    if normalizer:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


FORMS = [normalizers.NFC(), normalizers.NFD(), normalizers.NFKC(), normalizers.NFKD()]
SPLIT = pre_tokenizers.Split(" ", "isolated")
PREFIXED = pre_tokenizers.Sequence([SPLIT, pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)])


@pytest.mark.parametrize("tokenizer", [other(), *map(other, FORMS), other(pre=PREFIXED)])
@pytest.mark.parametrize("template", [None, "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"])
@pytest.mark.parametrize("text", NASTY)
def test_the_bound_holds_for_tokenizers_that_normalize_or_prefix(tokenizer, template, text):
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer)
    length = len(encoder.ids(user(text), "here"))
    assert length <= encoder.bound(user(text), "here")


def test_the_bound_holds_for_sentencepiece_like_tokenizers():
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"▁": 256, "a": 257, "<unk>": 258}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert ids_per_byte(tokenizer) == (2, None)
    for text in NASTY:
        assert len(encode(user(text), tokenizer, None, {})) <= Encoder(tokenizer).bound(user(text), "here")


@pytest.mark.parametrize(
    "odd",
    [
        other(normalizers.Lowercase()),
        other(normalizers.Replace("a", "bbbbbb")),
        other(normalizers.Sequence([normalizers.NFKC(), normalizers.NFD()])),
        other(normalizers.BertNormalizer()),
    ],
)
def test_an_unknown_tokenizer_step_gives_no_bound(odd):
    assert ids_per_byte(odd) is None and Encoder(odd).bound(user("x"), "here") is None


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] }}{{ messages[0]['content'] }}",
        "{{ messages[0]['content'] | tojson }}",
        "{{ messages[0]['content'] | upper }}",
        "{{ messages[0]['content'] | e }}",
    ],
)
def test_a_template_that_changes_contents_gives_no_bound(tokenizer, template):
    changing = copy.deepcopy(tokenizer)
    changing.chat_template = template
    assert Encoder(changing).bound(user("hello"), "here") is None


def test_where_only_tokenizing_can_tell_the_length(tokenizer):
    encoder = Encoder(tokenizer)
    assert encoder.bound(user("hi"), "here") == len("hi") + len(encode(user("x"), tokenizer, None, {})) + 2 * SLACK
    assert encoder.bound(user("\ud800 half"), "here") is None
    assert encoder.bound(user(""), "here") is None
    assert Encoder(tokenizer, vocab_size=len(tokenizer)).bound(user("hi"), "here") is not None
    assert Encoder(tokenizer, vocab_size=len(tokenizer) - 1).bound(user("hi"), "here") is None


def test_every_tuple_of_roles_is_encoded_once(tokenizer, monkeypatch):
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    encoder = Encoder(refusing)
    encoder.bound(user("hi"), "row 1")
    monkeypatch.setattr(encoder, "ids", lambda *_: pytest.fail("encoded again"))
    encoder.bound(user("another"), "row 2")
    monkeypatch.undo()
    for place in ("row 3", "row 4"):
        with pytest.raises(UserError, match=f"{place}: the tokenizer refuses this prompt: no system"):
            encoder.bound(user("S", "system") + user("hi"), place)


def test_the_template_of_the_embedded_model_is_simple(tokenizer):
    assert ids_per_byte(tokenizer) == (1, None)
    assert json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"] is None

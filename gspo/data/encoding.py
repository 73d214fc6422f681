"""Messages -> token ids, and how many there can be at most, told without tokenizing."""

import contextlib
import json
import unicodedata
from typing import Any

from gspo.data.schemas import Messages
from gspo.errors import UserError

SLACK = 8  # tokens a message: BPE may cut the template's words next to the content in more pieces than without it
PROBE = "q{0}<\"&'é中>\n{0}q"  # what a template that quotes, escapes or repeats contents would not keep

# Normalizers and pre-tokenizers that cut text, or take from it, but never add.
CUTTERS = {"ByteLevel", "Strip", "StripAccents", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"}
CUTTERS |= {"BertPreTokenizer", "CharDelimiterSplit", "UnicodeScripts", "FixedLength"}


def encode(messages: Messages, tokenizer: Any, system: str | None, template_kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Messages -> token ids up to where the answer begins; without a chat template, the plain text."""
    messages = _with_system(messages, system)
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template_kwargs)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tuple(tokenizer("\n".join(m["content"] for m in messages))["input_ids"])


def _with_system(messages: Messages, system: str | None) -> Messages:
    if system is not None and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


class Encoder:
    """One tokenizer, chat template and system prompt: the ids of messages, and a bound on how many there are."""

    def __init__(
        self,
        tokenizer: Any,
        system: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        vocab_size: int | None = None,
    ):
        self.tokenizer, self.system, self.template_kwargs = tokenizer, system, template_kwargs or {}
        self.vocab_size = vocab_size
        self._growth = growth(tokenizer)
        if vocab_size is not None and max(tokenizer.get_vocab().values()) >= vocab_size:
            self._growth = None  # only the ids themselves tell whether the model knows them
        self._overheads: dict[tuple[str, ...], int | None] = {}

    def ids(self, messages: Messages, place: str) -> tuple[int, ...]:
        """Token ids of the messages; UserError names the place."""
        try:
            ids = encode(messages, self.tokenizer, self.system, self.template_kwargs)
        except Exception as e:  # templates refuse roles, tokenizers refuse half characters; both raise many kinds
            raise UserError(f"{place}: the tokenizer refuses this prompt: {' '.join(str(e).split()):.200}.") from e
        if not ids or (self.vocab_size is not None and max(ids) >= self.vocab_size):
            raise UserError(
                f"{place}: the tokenizer gives no ids, or ids outside the model's {self.vocab_size}; wrong tokenizer?"
            )
        return ids

    def bound(self, messages: Messages, place: str) -> int | None:
        """At most so many ids; None where only tokenizing tells. The first messages of each tuple of roles are
        encoded really, for templates refuse roles; UserError names the place."""
        if self._growth is None:
            return None
        roles = tuple([m["role"] for m in messages])
        if roles not in self._overheads:
            self.ids(messages, place)
            self._overheads[roles] = self._overhead(roles)
        overhead = self._overheads[roles]
        if overhead is None:
            return None
        factor, form = self._growth
        size = 0
        for message in messages:
            content = message["content"]
            if content.isascii():
                size += len(content)
                continue
            try:
                size += len((unicodedata.normalize(form, content) if form else content).encode())
            except UnicodeEncodeError:  # half a character: the tokenizer is to say so
                return None
        if not size:
            return None  # perhaps no ids at all
        return overhead + factor * size

    def _overhead(self, roles: tuple[str, ...]) -> int | None:
        """Ids of everything but the contents; None for a template that does not simply put each content in once."""
        with contextlib.suppress(Exception):
            if self.tokenizer.chat_template:
                probes = [PROBE.format(i) for i in range(len(roles))]
                messages = [{"role": r, "content": c} for r, c in zip(roles, probes, strict=True)]
                text = self.tokenizer.apply_chat_template(
                    _with_system(messages, self.system),
                    tokenize=False,
                    add_generation_prompt=True,
                    **self.template_kwargs,
                )
                if any(text.count(probe) != 1 for probe in probes):
                    return None
            shortest = [{"role": r, "content": "x"} for r in roles]
            ids = encode(shortest, self.tokenizer, self.system, self.template_kwargs)
            return len(ids) + SLACK * (len(roles) + 1)
        return None


def growth(tokenizer: Any) -> tuple[int, str | None] | None:
    """(most ids a byte, Unicode normal form that is taken first) of a tokenizer; None where that cannot be told.

    No model of the tokenizers library gives more than one id a byte of what its normalizer leaves; what is put before
    words or special tokens can at most double it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    factor, form = 1, None
    for step in [*_steps(backend.normalizer), *_steps(backend.pre_tokenizer)]:
        kind = step.get("type")
        if kind in ("NFC", "NFD", "NFKC", "NFKD") and form is None:
            form = kind
        elif kind == "Prepend" or (kind == "ByteLevel" and step.get("add_prefix_space")):
            factor = 2
        elif kind == "Metaspace" and backend.token_to_id("▁") is not None:
            factor = factor if step.get("prepend_scheme") == "never" else 2
        elif kind == "Replace" and step["pattern"].get("String") == " " and step["content"] == "▁":
            if backend.token_to_id("▁") is None:
                return None
        elif kind not in CUTTERS:
            return None
    return factor, form


def _steps(component: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as its steps' JSON, nested sequences laid flat."""
    found, waiting = [], [json.loads(component.__getstate__())] if component is not None else []
    while waiting:
        step = waiting.pop(0)
        inner = step.get("normalizers") or step.get("pretokenizers")
        if step.get("type") == "Sequence":
            waiting = [*(inner or []), *waiting]
        else:
            found.append(step)
    return found

"""Turn messages into token ids, and bound their number without tokenizing."""

import contextlib
import json
import unicodedata
from typing import Any

from gspo.data.schemas import Messages
from gspo.errors import UserError

SLACK = 8  # tokens per message: next to a content, BPE may cut the template's words into more pieces than alone
PROBE = "q{0}<\"&'é中>\n{0}q"  # a content that a template changes if it quotes, escapes or repeats contents

# Normalizers and pre-tokenizers that cut or shorten text, but never lengthen it.
NEVER_LENGTHEN = {
    "ByteLevel",
    "Strip",
    "StripAccents",
    "Split",
    "Digits",
    "Punctuation",
    "Whitespace",
    "WhitespaceSplit",
}
NEVER_LENGTHEN |= {"BertPreTokenizer", "CharDelimiterSplit", "UnicodeScripts", "FixedLength"}


def encode(messages: Messages, tokenizer: Any, system: str | None, template_kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Return the token ids of messages up to where the response begins. Without a chat template: of the plain text."""
    messages = _with_system(messages, system)
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template_kwargs)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tuple(tokenizer("\n".join(m["content"] for m in messages))["input_ids"])


def _with_system(messages: Messages, system: str | None) -> Messages:
    """Return the messages, begun by the system prompt where they have none."""
    if system is not None and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


class Encoder:
    """Encode messages with one tokenizer, chat template and system prompt; bound the number of their token ids.

    With the model's `vocab_size`, ids that the model does not know are refused.
    """

    def __init__(
        self,
        tokenizer: Any,
        system: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        vocab_size: int | None = None,
    ):
        self.tokenizer, self.system, self.template_kwargs = tokenizer, system, template_kwargs or {}
        self.vocab_size = vocab_size
        self._growth = ids_per_byte(tokenizer)
        if vocab_size is not None and max(tokenizer.get_vocab().values()) >= vocab_size:
            self._growth = None  # no bound: every prompt must be encoded to see whether the model knows its ids
        self._overheads: dict[tuple[str, ...], int | None] = {}

    def ids(self, messages: Messages, place: str) -> tuple[int, ...]:
        """Return the token ids of the messages. Raise UserError, which names the place, where there are none."""
        try:
            ids = encode(messages, self.tokenizer, self.system, self.template_kwargs)
        except Exception as e:  # templates refuse roles, tokenizers refuse half characters; the types are many
            raise UserError(f"{place}: the tokenizer refuses this prompt: {' '.join(str(e).split()):.200}.") from e
        if not ids or (self.vocab_size is not None and max(ids) >= self.vocab_size):
            raise UserError(
                f"{place}: the tokenizer gives no token ids, or ids outside the model's {self.vocab_size}. Use the "
                "tokenizer that belongs to the model."
            )
        return ids

    def bound(self, messages: Messages, place: str) -> int | None:
        """Return an upper bound on the number of token ids; None where only tokenizing can tell.

        The first messages of each tuple of roles are encoded, as a template may refuse the roles: UserError.
        """
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
            except UnicodeEncodeError:  # half a character: leave the error to the tokenizer
                return None
        if not size:
            return None  # there may be no ids at all
        return overhead + factor * size

    def _overhead(self, roles: tuple[str, ...]) -> int | None:
        """Return the number of ids beside the contents; None where the template changes or repeats a content."""
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


def ids_per_byte(tokenizer: Any) -> tuple[int, str | None] | None:
    """Return (most ids per byte of text, Unicode normal form that is applied first); None where it is not known.

    No model of the tokenizers library gives more than one id per byte of normalized text; a prefix that is put before
    words or special tokens can at most double that.
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
        elif kind not in NEVER_LENGTHEN:
            return None
    return factor, form


def _steps(component: Any) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer as JSON, nested sequences flattened."""
    found, waiting = [], [json.loads(component.__getstate__())] if component is not None else []
    while waiting:
        step = waiting.pop(0)
        inner = step.get("normalizers") or step.get("pretokenizers")
        if step.get("type") == "Sequence":
            waiting = [*(inner or []), *waiting]
        else:
            found.append(step)
    return found

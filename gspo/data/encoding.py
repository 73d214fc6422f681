"""Turn messages into token ids, and bound their number without tokenizing."""

import contextlib
import difflib
import inspect
import json
import re
import unicodedata
from typing import Any

from gspo.data.messages import Messages, Tools
from gspo.errors import UserError
from gspo.system.console import say

SLOW_CHARACTERS = 2_000_000  # of one prompt; it takes a tokenizer seconds
SLACK = 8  # tokens per message: next to a content, BPE may cut the template's words into more pieces than alone
WORD = "word{0}word"  # a content that no template changes: it is in the text, or was left out
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


DECIDED = (
    "conversation",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
)  # by each prompt, not by a user
REASONING = {"reasoning_content", "reasoning", "thinking"}  # names that transformers treats as one


def encode(
    messages: Messages, tokenizer: Any, system: str | None, template_kwargs: dict[str, Any], tools: Tools | None = None
) -> tuple[int, ...]:
    """Return the token ids of messages up to where the response begins. Without a chat template: of the plain text."""
    messages = _with_system(messages, system)
    if tokenizer.chat_template:
        text = render(messages, tokenizer, template_kwargs, tools)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tuple(tokenizer("\n".join(m["content"] for m in messages))["input_ids"])


def render(messages: Messages, tokenizer: Any, template_kwargs: dict[str, Any], tools: Tools | None = None) -> str:
    """Return the text of messages by the chat template. A last message of the assistant is continued, not closed."""
    continued = messages[-1]["role"] == "assistant"
    given = template_kwargs if tools is None else {**template_kwargs, "tools": tools}
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not continued, continue_final_message=continued, **given
    )


def template_text(tokenizer: Any, template_kwargs: dict[str, Any], tools: Tools | None = None) -> str:
    """Return the chat template that is used; empty where there is none."""
    if not tokenizer.chat_template:
        return ""
    return tokenizer.get_chat_template(template_kwargs.get("chat_template"), tools)


def names_in(template: str) -> set[str]:
    """Return the words in a template's statements and expressions: a superset of the names that it reads."""
    return set(re.findall(r"\w+", " ".join(re.findall(r"\{[{%](.*?)[%}]\}", template, re.DOTALL))))


def check_template_kwargs(tokenizer: Any, template_kwargs: dict[str, Any]) -> None:
    """Warn of a key of data.chat_template_kwargs that the template never reads. UserError for one that is not free."""
    place = "data.chat_template_kwargs"
    if decided := [key for key in template_kwargs if key in DECIDED]:
        raise UserError(
            f"{place}: {decided[0]!r} follows from each prompt's last message and cannot be set. Remove it."
        )
    if not template_kwargs:
        return
    template = template_text(tokenizer, template_kwargs, template_kwargs.get("tools"))
    names = names_in(template)
    for key in template_kwargs:
        if key == "chat_template" or key in names:
            continue
        if not template:
            say(f"warning: {place}: {key!r} has no effect, as this tokenizer has no chat template.")
            continue
        options = names - set(inspect.signature(tokenizer.apply_chat_template).parameters)
        near = difflib.get_close_matches(key, options, n=1)
        meant = f" Do you mean {near[0]!r}?" if near else ""
        say(f"warning: {place}: the chat template never reads {key!r}, so it has no effect.{meant}")


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
        self._roles: set[str] = set()  # roles of which it is known whether the template shows their messages
        self._unread: set[str] = set()  # fields of messages of which it was said that the template never reads them

    def ids(self, messages: Messages, place: str, tools: Tools | None = None) -> tuple[int, ...]:
        """Return the token ids of the messages. Raise UserError, which names the place, where there are none."""
        self._check_fields(messages, place, tools)
        if (length := sum(len(str(m.get("content", ""))) for m in messages)) > SLOW_CHARACTERS:
            say(f"note: {place}: the tokenizer reads a prompt of {length:,} characters, which takes a while")
        try:
            ids = encode(messages, self.tokenizer, self.system, self.template_kwargs, *([tools] if tools else []))
        except Exception as e:  # templates refuse roles, tokenizers refuse half characters; the types are many
            raise UserError(f"{place}: the tokenizer refuses this prompt: {' '.join(str(e).split()):.200}.") from e
        if not ids or (self.vocab_size is not None and max(ids) >= self.vocab_size):
            raise UserError(
                f"{place}: the tokenizer gives no token ids, or ids outside the model's {self.vocab_size}. Use the "
                "tokenizer that belongs to the model."
            )
        return ids

    def _check_fields(self, messages: Messages, place: str, tools: Tools | None) -> None:
        """Raise UserError where a prompt cannot be shown to the model; say once which fields a template leaves out."""
        last = messages[-1]
        if last["role"] == "assistant" and not isinstance(last.get("content"), str):
            raise UserError(
                f"{place}: the prompt ends in a message of the assistant without content, so there is no text to "
                "continue. Leave that message out, or add what the tool answered."
            )
        fields = {key for message in messages for key in message} - {"role", "content"}
        fields |= {"tools"} if tools else set()
        if not fields <= self._unread:
            self._check_read(fields, place, tools)
        if self.tokenizer.chat_template and not {m["role"] for m in messages} <= self._roles:
            self._check_shown(messages, place, tools)

    def _check_read(self, fields: set[str], place: str, tools: Tools | None) -> None:
        """Say once of each field that the chat template never reads it. UserError where there is no template at all."""
        template = template_text(self.tokenizer, self.template_kwargs, tools)
        if not template:
            raise UserError(
                f"{place}: the prompt has {', '.join(map(repr, sorted(fields)))}, but this tokenizer has no chat "
                "template that could show it. Use the model's own tokenizer, or leave the field out."
            )
        names = names_in(template)
        if names & REASONING:
            names |= REASONING
        whole = re.search(r"\bmessages?\s*\|\s*tojson|\.items\(", template)  # it writes whatever a message has
        unread = set() if whole else fields - names
        if unread - self._unread:
            say(
                f"warning: {place}: the chat template never reads {', '.join(map(repr, sorted(unread)))}, so the model "
                "does not see it, here and in other rows."
            )
        self._unread |= fields

    def _check_shown(self, messages: Messages, place: str, tools: Tools | None) -> None:
        """Say once of each role that the chat template leaves its messages out. UserError where it shows none at all.

        What a template refuses is left to whoever encodes the prompt.
        """
        whole = _with_system(messages, self.system)
        words = [
            {**m, "content": WORD.format(i)} if isinstance(m.get("content"), str) else m for i, m in enumerate(whole)
        ]
        try:
            text = render(words, self.tokenizer, self.template_kwargs, tools).lower()  # some write capitals
        except Exception:
            return
        shown = {m["role"] for i, m in enumerate(words) if m.get("content") != WORD.format(i) or m["content"] in text}
        if not any(WORD.format(i) in text for i in range(len(words))) and not tools:
            raise UserError(
                f"{place}: the chat template shows nothing of this prompt, whose roles are "
                f"{', '.join(sorted({repr(m['role']) for m in whole}))}. Give the roles that the model knows, mostly "
                "user, assistant and system, or its own template."
            )
        hidden = {m["role"] for m in whole} - shown - self._roles
        if hidden:
            say(
                f"warning: {place}: the chat template leaves out messages of the role "
                f"{', '.join(map(repr, sorted(hidden)))}, so the model does not see them, here and in other rows."
            )
        self._roles |= {m["role"] for m in whole}

    def bound(self, messages: Messages, place: str, tools: Tools | None = None) -> int | None:
        """Return an upper bound on the number of token ids; None where only tokenizing can tell.

        The first messages of each tuple of roles are encoded, as a template may refuse the roles: UserError.
        """
        if self._growth is None or tools or any(len(m) != 2 or "content" not in m for m in messages):
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

    def response_length(self, text: str, enough: int) -> int:
        """Return how many tokens a response has, its end included; a bound where that is at most `enough`."""
        if self._growth is not None and text.isascii():
            bound = self._growth[0] * len(text) + 1 + SLACK
            if bound <= enough:
                return bound
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1

    def _overhead(self, roles: tuple[str, ...]) -> int | None:
        """Return the number of ids beside the contents; None where the template changes or repeats a content."""
        with contextlib.suppress(Exception):
            if self.tokenizer.chat_template:
                probes = [PROBE.format(i) for i in range(len(roles))]
                messages = [{"role": r, "content": c} for r, c in zip(roles, probes, strict=True)]
                text = render(_with_system(messages, self.system), self.tokenizer, self.template_kwargs)
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

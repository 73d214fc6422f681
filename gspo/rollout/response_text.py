"""Decode responses to text, with tags such as <think> that the tokenizer marks as special."""

import re
from collections import deque
from collections.abc import Callable, Set
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np

SHOWN = 6  # tags in a note
WORDS = re.compile(
    r"think|thought|reason|reflect|plan|answer|solution|final|tool|func|call|code|python|exec|output|result|search|query"
    r"|observation|channel|message|step|box",
    re.IGNORECASE,
)
NO_TAG = re.compile(r"reserved|unused|extra_id|placeholder|dummy", re.IGNORECASE)


def decode(tokenizer: Any, ids: list[int], dropped: Set[int], skip_special_tokens: bool = False) -> str:
    """Return the text of a response without the tokens `dropped`, its end and padding.

    Other special tokens, such as <think>, are part of the text; `skip_special_tokens` leaves them out.
    """
    return tokenizer.decode([t for t in ids if t not in dropped], skip_special_tokens=skip_special_tokens)


class GroupTexts:
    """Decode groups of responses, and hand each group's texts over in this thread, in the order in which groups ended.

    With `beside` another thread decodes, so that a GPU does not wait for it.
    """

    def __init__(self, decode: Callable[[list[int]], str], hand_over: Callable[[int, list[str]], None], beside: bool):
        self._decode, self._hand_over = decode, hand_over
        self._thread = ThreadPoolExecutor(1, "texts") if beside else None
        self._under_way: deque[tuple[int, Future[list[str]]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *rest: Any) -> None:
        if failed is None:
            self._hand_over_decoded(all_of_them=True)
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def add(self, group: int, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Decode the responses of a group, tokens [n, L] of lengths [n], and hand over what is ready."""
        if self._thread is None:
            self._hand_over(group, self._texts(tokens, lengths))
            return
        self._under_way.append((group, self._thread.submit(self._texts, tokens, lengths)))
        self._hand_over_decoded()

    def _texts(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        responses = zip(tokens.tolist(), lengths.tolist(), strict=True)
        return [self._decode(ids[:length]) for ids, length in responses]

    def _hand_over_decoded(self, all_of_them: bool = False) -> None:
        while self._under_way and (all_of_them or self._under_way[0][1].done()):
            group, texts = self._under_way.popleft()
            self._hand_over(group, texts.result())


def special_tags(tokenizer: Any, dropped: Set[int]) -> list[str]:
    """Return the special tokens that look like tags of a response: <think>, </answer>, [TOOL_CALLS].

    They come in pairs, or are named for what stands in a response. What the template writes around a user's message is
    none, nor are end and padding.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token.content: number for number, token in added.items() if token.special and number not in dropped}
    around = _template_text(tokenizer)
    names = [name for name in special if not NO_TAG.search(name) and name not in around]
    return [name for name in names if WORDS.search(name) or _counterparts(name) & special.keys()]


def _counterparts(name: str) -> set[str]:
    """Return what closes or opens a tag: </x> for <x>, <|/x|> for <|x|>, <|x_end|> for <|x_start|>, and back."""
    swaps = [
        ("<|/", "<|"),
        ("</", "<"),
        ("[/", "["),
        ("_end", "_start"),
        ("end_of", "start_of"),
        ("end_of", "begin_of"),
    ]
    found = {name.replace(a, b, 1) for a, b in swaps} | {name.replace(b, a, 1) for a, b in swaps}
    return found - {name}


def _template_text(tokenizer: Any) -> str:
    """Return what the chat template makes of a user's message; nothing where there is no template, or it refuses."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False))
    except Exception:  # templates raise kinds of their own; then all tags are named
        return ""


def tags_note(tags: list[str], skip_special_tokens: bool) -> str:
    """Return the line that a program begins with where the tokenizer marks tags as special; "" where it marks none."""
    if not tags:
        return ""
    more = f" and {len(tags) - SHOWN} more" if len(tags) > SHOWN else ""
    named = f"{', '.join(tags[:SHOWN])}{more}"
    if skip_special_tokens:
        return (
            f"warning: rollout.skip_special_tokens=true: the tokenizer marks {named} as special, so neither the reward "
            "function nor samples see them in a response."
        )
    return (
        f"note: the tokenizer marks {named} as special; the reward function and samples see them in a response "
        "(rollout.skip_special_tokens=false)."
    )

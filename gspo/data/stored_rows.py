"""Read rows that hold the responses to learn from: chosen and rejected, or responses and their rewards.

- a pair: `{"prompt", "chosen", "rejected"}`. The two are texts, or lists of messages that end in the assistant's; such
  lists may begin with the prompt, which then need not stand beside them (as in TRL's and UltraFeedback's files).
- a group: `{"prompt", "responses": [text, ...], "rewards": [number, ...]}`; with `finish_reasons` a response whose
  reason is "length" was cut off and gets no end token.

A pair is a group of two, rewarded 1 and 0.
"""

import math
from typing import Any

import torch

from gspo.data.messages import Messages, question_of, read_messages, refuse_other_media
from gspo.errors import UserError
from gspo.types import Collected, Prompt, Rollout, Scores, StoredResponses

PAIR, GROUP = ("chosen", "rejected"), ("responses", "rewards", "finish_reasons")
STORED_FIELDS = {*PAIR, *GROUP}
PAIR_REWARDS = (1.0, 0.0)


def split_row(row: Any, place: str, required: bool = True) -> tuple[Any, StoredResponses | None]:
    """Return a row with its prompt, without its responses, and these; None where it has none and none is `required`.

    Raise UserError, which names the place and the field.
    """
    if not isinstance(row, dict):
        return row, None  # parse_row says what is wrong
    rest = {name: value for name, value in row.items() if name not in STORED_FIELDS}
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return _pair(row, rest, place)
    if row.get("responses") is not None or row.get("rewards") is not None:
        return rest, _group(row, place)
    if required:
        raise UserError(
            f"{place}: the row has no responses to learn from; it needs `chosen` and `rejected`, or `responses` and "
            "`rewards` (rollout.source=policy samples them instead, for an algorithm that can)."
        )
    return rest, None


def _pair(row: dict[str, Any], rest: dict[str, Any], place: str) -> tuple[dict[str, Any], StoredResponses]:
    """Return the row of a pair with its prompt, and the pair."""
    (before, chosen), (before_rejected, rejected) = (_response(row.get(name), name, place) for name in PAIR)
    if before != before_rejected:
        raise UserError(f"{place}: 'chosen' and 'rejected' answer different prompts: all messages but the last differ.")
    if before:
        given = row.get("prompt")
        if given is not None and question_of(read_messages(given, place)) != question_of(before):
            raise UserError(f"{place}: field 'prompt' is not what 'chosen' answers, {question_of(before)!r:.80}.")
        rest = rest | {"prompt": before}
    elif row.get("prompt") is None:
        raise UserError(f"{place}: field 'prompt' is missing, and 'chosen' and 'rejected' do not begin with it.")
    return rest, StoredResponses((chosen, rejected), PAIR_REWARDS, (True, True))


def _response(value: Any, name: str, place: str) -> tuple[Messages, str]:
    """Return (messages before the response, its text) of a text or of a list that ends in the assistant's message."""
    if isinstance(value, str):
        return [], value
    expected = "a text, or a list of {role, content} messages that ends in the assistant's"
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        got = "nothing" if value is None else f"{value!r:.80}"
        raise UserError(f"{place}: field {name!r} must be {expected}, got {got}.")
    last = value[-1]
    refuse_other_media(last, f"{place}: field {name!r}")
    if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise UserError(f"{place}: field {name!r} must be {expected}, got {last!r:.80} as the last.")
    before = read_messages(value[:-1], f"{place}: before the end of {name!r}") if len(value) > 1 else []
    if before and before[-1]["role"] == "assistant":
        raise UserError(f"{place}: field {name!r} ends in two messages of the assistant; one is the response.")
    return before, last["content"]


def _group(row: dict[str, Any], place: str) -> StoredResponses:
    """Return the stored group of a row."""
    texts, rewards = row.get("responses"), row.get("rewards")
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{place}: field 'responses' must be a list of two texts or more, got {texts!r:.80}.")
    numbers = isinstance(rewards, list) and all(isinstance(r, int | float) and math.isfinite(r) for r in rewards)
    if not numbers or len(rewards) != len(texts):
        raise UserError(
            f"{place}: field 'rewards' must be a list of {len(texts)} finite numbers, one a response, got "
            f"{rewards!r:.80}."
        )
    reasons = row.get("finish_reasons") or ["stop"] * len(texts)
    known = isinstance(reasons, list) and all(reason in ("stop", "length") for reason in reasons)
    if not known or len(reasons) != len(texts):
        raise UserError(f"{place}: field 'finish_reasons' must be {len(texts)} of 'stop' or 'length', got {reasons!r}.")
    if any(reason == "length" and not text for reason, text in zip(reasons, texts, strict=True)):
        raise UserError(f"{place}: a response that was cut off (finish_reasons: 'length') has no text.")
    return StoredResponses(tuple(texts), tuple(map(float, rewards)), tuple(r == "stop" for r in reasons))


def response_ids(text: str, finished: bool, tokenizer: Any, end_id: int) -> list[int]:
    """Return the tokens of a stored response, the end of sequence included where it ended by itself."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], *([end_id] if finished else [])]


def stored_groups(
    prompts: list[Prompt], places: list[int], tokenizer: Any, end_id: int, device: torch.device
) -> Collected:
    """Return the stored groups at some places of a batch [G, N, L], as if they had been sampled and scored.

    Their log-probs under whatever sampled them are unknown: zeros, as their entropy.
    """
    mine, n = [prompts[place] for place in places], len(prompts[0].stored.texts)
    ids = [
        [response_ids(*pair, tokenizer, end_id) for pair in zip(p.stored.texts, p.stored.finished, strict=True)]
        for p in mine
    ]
    lengths = torch.tensor([[len(tokens) for tokens in group] for group in ids], dtype=torch.long).view(-1, n)
    tokens = torch.zeros(len(mine), n, int(lengths.max()) if ids else 0, dtype=torch.long)
    for g, group in enumerate(ids):
        for i, response in enumerate(group):
            tokens[g, i, : len(response)] = torch.tensor(response)
    finished = torch.tensor([p.stored.finished for p in mine], dtype=torch.bool).view(-1, n)
    unknown = torch.zeros(tokens.shape, device=device)
    on_device = (x.to(device) for x in (tokens, lengths))
    texts = [list(p.stored.texts) for p in mine]
    rollout = Rollout(mine, *on_device, unknown, unknown.clone(), finished.to(device), texts)
    rewards = torch.tensor([p.stored.rewards for p in mine], dtype=torch.float32).view(-1, n)
    return places, rollout, Scores(rewards, predictions=[[None] * n for _ in mine])

"""Stop strings, found in the text of an answer's last few tokens, and only when its newest token can have ended one."""

from typing import Any

import torch
from torch import Tensor

from gspo.errors import UserError

SLACK = 8  # tokens before a stop string, so that how a decoder treats the beginning of a text does not matter


class StopStrings:
    """Tells which answers have just come to one of the strings `stops`; one look at a table a step, mostly.

    Raises UserError for an empty string.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...], vocab_size: int, device: torch.device):
        if not all(stops):
            raise UserError(f"rollout.stop = {list(stops)!r} holds an empty text, at which every answer would end.")
        self.tokenizer, self.stops = tokenizer, stops
        self.tail = max(len(stop.encode()) for stop in stops) + SLACK  # a token is at least a byte
        lasts = {stop[-1] for stop in stops} | {"\ufffd"}  # the latter: part of a character
        # twice, as some decoders drop the space before a first word
        ends = [bool(lasts & set(self._text([i, i]))) for i in range(vocab_size)]
        self.may_end = torch.tensor(ends, device=device)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def ends(self, answers: Tensor, rows: Tensor, first: Tensor, upto: Tensor) -> Tensor:
        """[S]: tokens of each answer until a stop string is complete, if the first one is by the newest tokens of the
        answers [R, L] in `rows` [S], from `first` [S] to `upto` [S], and 0 where none is."""
        at = first[:, None] + torch.arange(int((upto - first).amax()), device=first.device)
        newest = answers[rows[:, None], at.clamp(max=answers.shape[1] - 1)]
        found = torch.zeros_like(first)
        for k, nth in (self.may_end[newest] & (at < upto[:, None])).nonzero().tolist():
            if found[k] == 0:
                end = int(first[k]) + nth + 1
                text = self._text(answers[rows[k], max(0, end - self.tail) : end].tolist())
                found[k] = end if any(stop in text for stop in self.stops) else 0
        return found

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

    def ended(self, answers: Tensor, rows: Tensor, position: Tensor) -> Tensor:
        """[S] bool: whether the answers [R, L] in `rows` [S] come to a stop string with the token at `position` [S]."""
        newest = answers[rows, position]
        ended = self.may_end[newest]
        for k in ended.nonzero().flatten().tolist():
            upto = int(position[k]) + 1
            text = self._text(answers[rows[k], max(0, upto - self.tail) : upto].tolist())
            ended[k] = any(stop in text for stop in self.stops)
        return ended

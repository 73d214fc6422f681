"""Find stop strings in the text of a response's last few tokens, and only if its newest token can complete one."""

from typing import Any

import torch
from torch import Tensor

from gspo.errors import UserError

SLACK = 8  # tokens decoded before a stop string: decoders treat the beginning of a text in their own ways


class StopStrings:
    """Tell which responses have just completed one of the strings `stops`; mostly by one look at a table a step.

    Special tokens count, also where the texts are without them: `</answer>` may be one.
    Raises UserError for an empty string.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...], vocab_size: int, device: torch.device):
        if not all(stops):
            raise UserError(f"rollout.stop = {list(stops)!r} holds an empty text, at which every response would end.")
        self.tokenizer, self.stops = tokenizer, stops
        self.tail = max(len(stop.encode()) for stop in stops) + SLACK  # a token is at least a byte
        lasts = {stop[-1] for stop in stops} | {"\ufffd"}  # the replacement character stands for part of a character
        # twice, as some decoders drop the space before a first word
        ends = [bool(lasts & set(self._text([i, i]))) for i in range(vocab_size)]
        self.may_end = torch.tensor(ends, device=device)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def ends(self, responses: Tensor, rows: Tensor, first: Tensor, upto: Tensor) -> Tensor:
        """Return the length [S] at which each response first completes a stop string; 0 where none does.

        Only the newest tokens are searched: those from `first` [S] to `upto` [S] of the responses [R, L] in `rows` [S].
        """
        at = first[:, None] + torch.arange(int((upto - first).amax()), device=first.device)
        newest = responses[rows[:, None], at.clamp(max=responses.shape[1] - 1)]
        found = torch.zeros_like(first)
        for k, nth in (self.may_end[newest] & (at < upto[:, None])).nonzero().tolist():
            if found[k] == 0:
                end = int(first[k]) + nth + 1
                text = self._text(responses[rows[k], max(0, end - self.tail) : end].tolist())
                found[k] = end if any(stop in text for stop in self.stops) else 0
        return found

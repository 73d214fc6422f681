"""Hold the keys and values of trunks between the two times that a tree goes through an engine."""

import torch
from torch import Tensor

Tokens = dict[int, tuple[Tensor, Tensor]]  # layer -> keys [T, Hk, D] and values [T, Hk, Dv] of T tokens in a row


class KeptKeys:
    """Keys and values of responses that have ended (trunks) and of their prompts, up to `room` bytes.

    An engine may put them here while it samples trunks and begin their branches with them. One that does neither
    computes the beginnings of branches as prompts.
    """

    def __init__(self) -> None:
        self.room = self.bytes = 0
        self.used: set[int] = set()  # rows of trunks whose branches were begun with them
        self.attention_kinds_seen: set[tuple[float, float | None, int | None]] = set()  # see kv_pages.Pages
        self._prompts: dict[int, Tokens] = {}
        self._responses: dict[int, tuple[int, Tokens]] = {}  # row -> number of its prompt, and tokens of its own

    def __contains__(self, row: int) -> bool:
        return row in self._responses

    def has_prompt(self, number: int) -> bool:
        """Tell whether a trunk of this prompt is kept, and the prompt with it."""
        return number in self._prompts

    def add(self, prompts: dict[int, Tokens], rows: list[int], numbers: list[int], responses: list[Tokens]) -> None:
        """Keep new prompts, and the responses at `rows` to the prompts `numbers`."""
        self._prompts |= prompts
        self._responses |= dict(zip(rows, zip(numbers, responses, strict=True), strict=True))
        self.bytes += sum(x.nbytes for part in (*prompts.values(), *responses) for pair in part.values() for x in pair)

    def drop(self) -> None:
        """Keep nothing any more."""
        self._prompts, self._responses, self.bytes = {}, {}, 0

    def read(self, row: int, layer: int, size: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys [T, Hk, D] and values of the first `size` tokens of a trunk, its prompt included."""
        number, response = self._responses[row]
        return tuple(torch.cat(x)[:size] for x in zip(self._prompts[number][layer], response[layer], strict=True))

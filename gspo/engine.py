"""The sampling loop: prompts wait in a queue, answers in slots grow by a token a step, and make room when they end."""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from gspo.decode_attention import forward
from gspo.sampling import Sampling, choose, uniforms
from gspo.slots import Slots
from gspo.stop import StopStrings

PREFILL_AHEAD = 256  # prompt tokens computed at once, if there is room: fewer make poor matrix products
PREFILL_MOST = 4096  # ... and at most, unless one prompt is longer
DRAWN_AT_ONCE = 256  # first tokens


class Engine:
    """Works off R = G * n answers to G prompts; row g * n + i of the results is answer i to prompt g."""

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        max_slots: int,
        prompts: list[tuple[int, ...]],
        n: int,
        sampling: Sampling,
        keys: Tensor,
        ends: Tensor,
        limits: Tensor,
        stop: StopStrings | None,
        agree: Callable[[Tensor], Tensor] | None,
        pad_id: int,
    ):
        self.model, self.slots, self.max_slots, self.prompts, self.n = model, slots, max_slots, prompts, n
        self.sampling, self.keys, self.ends, self.limits = sampling, keys, ends, limits
        self.stop, self.agree = stop, agree
        device, rows = keys.device, len(prompts) * n
        self.tokens = torch.full((rows, sampling.max_new_tokens), pad_id, device=device)
        self.logprobs = torch.zeros(rows, sampling.max_new_tokens, device=device)
        self.entropy = torch.zeros(rows, sampling.max_new_tokens, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.queue = deque(sorted(range(len(prompts)), key=lambda g: len(prompts[g])))  # alike lengths pad least
        self.waiting: deque[int] = deque()  # rows whose first token is drawn
        self.left = np.full(len(prompts), n)  # answers of each prompt that have not ended

    def run(self, tick: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Sample everything; yields each prompt's number as soon as its last answer has ended. Calls `tick` now and
        then."""
        while self.queue or self.waiting or len(self.slots):
            yield from self._admit()
            if len(self.slots):
                yield from self._decode()
            tick()

    def _admit(self) -> Iterator[int]:
        """Give free slots to those that wait, and compute further prompts where too few do."""
        while (room := self.max_slots - len(self.slots)) and (self.waiting or self.queue):
            if len(self.waiting) < room and (numbers := self._next_prompts(room - len(self.waiting))):
                yield from self._prefill(numbers)
            elif self.waiting:
                rows = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
                self.slots.seat(rows, [row // self.n for row in rows])
            else:
                return  # until a prompt makes room

    def _next_prompts(self, rows: int) -> list[int]:
        """Numbers of the next prompts to compute together, taken from the queue: enough for `rows` further answers."""
        numbers: list[int] = []
        sizes: list[int] = []
        while self.queue:
            size = len(self.prompts[self.queue[0]])
            enough = len(numbers) * self.n >= rows and sum(sizes) >= PREFILL_AHEAD
            if enough or not self.slots.fits([*sizes, size]) or (sizes and sum(sizes) + size > PREFILL_MOST):
                break
            numbers.append(self.queue.popleft())
            sizes.append(size)
        return numbers

    def _prefill(self, numbers: list[int]) -> Iterator[int]:
        """Compute prompts, and draw the first token of all their answers."""
        logits = forward(self.model, self.slots.prefill(numbers, [self.prompts[g] for g in numbers]))
        rows = (np.array(numbers)[:, None] * self.n + np.arange(self.n)).flatten()
        going_on = np.zeros(len(rows), dtype=bool)
        for at in range(0, len(rows), DRAWN_AT_ONCE):
            part = slice(at, at + DRAWN_AT_ONCE)
            mine = torch.from_numpy(rows[part]).to(logits.device)
            owner = torch.arange(len(rows), device=logits.device)[part] // self.n
            going_on[part] = ~self._draw(logits[owner], mine, torch.zeros_like(mine))
        self.waiting.extend(rows[going_on].tolist())
        yield from self._ended(rows[~going_on])

    def _decode(self) -> Iterator[int]:
        """One more token for every slot."""
        rows = torch.from_numpy(self.slots.rows).to(self.tokens.device)
        step = self.slots.step()
        logits = forward(self.model, step, self.tokens[rows, step.lengths - 1])
        ended = self._draw(logits, rows, step.lengths)
        if ended.any():
            gone = self.slots.rows[ended]
            self.slots.keep(~ended)
            yield from self._ended(gone)

    def _draw(self, logits: Tensor, rows: Tensor, position: Tensor) -> np.ndarray:
        """Draw a token from each of logits [S, V] and write it at `position` [S] of `rows` [S] -> [S], who has ended.

        The one look that the host takes at what was drawn.
        """
        u = None if self.sampling.temperature == 0 else uniforms(self.keys[rows], position)
        token, logprob, entropy = choose(logits, u, self.sampling)
        if self.agree is not None:
            token = self.agree(token)
        self.tokens[rows, position], self.logprobs[rows, position] = token, logprob
        self.entropy[rows, position], self.lengths[rows] = entropy, position + 1
        finished = torch.isin(token, self.ends)
        if self.stop is not None:
            finished |= self.stop.ended(self.tokens, rows, position)
        self.finished[rows] = finished
        return (finished | (position + 1 >= self.limits[rows])).cpu().numpy()

    def _ended(self, rows: np.ndarray) -> list[int]:
        """Prompts that have no answer left, which are forgotten."""
        np.subtract.at(self.left, rows // self.n, 1)
        done = [g for g in np.unique(rows // self.n).tolist() if self.left[g] == 0]
        self.slots.forget(done)
        return done

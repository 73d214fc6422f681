"""The sampling loop: prompts wait in a queue, answers in slots grow by a token a step, and make room when they end.

On the CPU the host looks at every token and lays out the next step as tightly as it goes. On CUDA it looks every few
steps, which all have the same shape (device_tables.py) and are replayed (cuda_graphs.py).
"""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from gspo.rollout.attention import forward
from gspo.rollout.cuda_graphs import Replay
from gspo.rollout.device_tables import FixedStep, Tables
from gspo.rollout.sampling import Sampling, draw
from gspo.rollout.slots import Slots
from gspo.rollout.stop_strings import StopStrings

PREFILL_AHEAD = 256  # prompt tokens computed at once, if there is room: fewer make poor matrix products
PREFILL_MOST = 2048  # ... and at most, unless one prompt is longer: what more of them make falls out of a CPU's caches
DRAWN_AT_ONCE = 256  # first tokens
STEPS = {"cuda": 8}  # between two looks of the host; elsewhere it looks at every token


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
        self.sampling, self.ends = sampling, ends
        self.stop, self.agree = stop, agree
        device, rows, most = keys.device, len(prompts) * n, sampling.max_new_tokens
        # the last row is nobody's: what slots that stand still draw goes there
        self.tokens = torch.full((rows + 1, most), pad_id, device=device)
        self.logprobs, self.entropy = (torch.zeros(rows + 1, most, device=device) for _ in range(2))
        self.lengths = torch.zeros(rows + 1, dtype=torch.long, device=device)
        self.finished = torch.zeros(rows + 1, dtype=torch.bool, device=device)
        self.keys, self.limits = (torch.nn.functional.pad(x, (0, 1)) for x in (keys, limits))
        self.pad_id, self.nobody = pad_id, rows
        if steps := STEPS.get(device.type, 0):
            self.most_tokens = limits.cpu().numpy()
            self.tables = Tables(slots, max_slots, n, max(map(len, prompts)), most)
            self.replay = Replay(device if device.type == "cuda" and agree is None else None)
        self.steps = steps
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
            position = torch.zeros_like(mine)
            ended = self._draw(logits[owner], mine, position)
            going_on[part] = ~self._look(mine, position, ended)
        self.waiting.extend(rows[going_on].tolist())
        yield from self._ended(rows[~going_on])

    def _decode(self) -> Iterator[int]:
        """Further tokens for every slot, until the next look."""
        yield from self._decode_block() if self.steps else self._decode_token()

    def _decode_token(self) -> Iterator[int]:
        """One more token for every slot."""
        rows = torch.from_numpy(self.slots.rows).to(self.tokens.device)
        step = self.slots.step()
        logits = forward(self.model, step, self.tokens[rows, step.lengths - 1])
        ended = self._draw(logits, rows, step.lengths)
        yield from self._leave(self._look(rows, step.lengths, ended))

    def _decode_block(self) -> Iterator[int]:
        """Up to `steps` more tokens for every slot, and then one look."""
        slots, most = self.slots, self.most_tokens[self.slots.rows]
        first = slots.length + 1
        steps, count = min(self.steps, int((most - first).max())), self.tables.count()
        self.tables.load(count, np.minimum(slots.length + steps, most - 1), nobody=self.nobody)
        for _ in range(steps):
            self.replay(self._fixed_step, count)
        rows, lengths = self.tables.read()
        ended = rows == self.nobody
        if self.stop is not None:
            ended |= self._cut(first)
        slots.length = lengths
        yield from self._leave(ended)

    def _fixed_step(self, count: int) -> None:
        """One more token for the first `count` slots of the tables. Nothing here waits for the device."""
        step = FixedStep(self.tables, count)
        logits = forward(self.model, step, self.tokens[step.rows, step.lengths - 1])
        ended = self._draw(logits, step.rows, step.lengths)
        rows = step.rows.masked_fill(ended, self.nobody)
        step.lengths.add_(rows != self.nobody)
        step.rows.copy_(rows)

    def _draw(self, logits: Tensor, rows: Tensor, position: Tensor) -> Tensor:
        """Draw a token from each of logits [S, V] and write it at `position` [S] of `rows` [S] -> [S], whether it is an
        answer's last, stop strings aside."""
        token, logprob, entropy = draw(logits, self.keys[rows], position, self.sampling)
        if self.agree is not None:
            token = self.agree(token)
        self.tokens[rows, position], self.logprobs[rows, position] = token, logprob
        self.entropy[rows, position], self.lengths[rows] = entropy, position + 1
        finished = (token[:, None] == self.ends).any(-1)
        self.finished[rows] = finished
        return finished | (position + 1 >= self.limits[rows])

    def _look(self, rows: Tensor, position: Tensor, ended: Tensor) -> np.ndarray:
        """[S], who has ended with the token at `position` [S] of `rows` [S]: a look of the host at what was drawn."""
        if self.stop is not None:
            stopped = self.stop.ends(self.tokens, rows, position, position + 1) > 0
            self.finished[rows] |= stopped
            ended = ended | stopped
        return ended.cpu().numpy()

    def _cut(self, first: np.ndarray) -> np.ndarray:
        """[S], which slots' answers have come to a stop string since their tokens `first` [S], and end there."""
        rows = torch.from_numpy(self.slots.rows).to(self.tokens.device)
        ends = self.stop.ends(self.tokens, rows, torch.from_numpy(first).to(rows), self.lengths[rows])
        stopped = ends > 0
        rows, ends = rows[stopped], ends[stopped]
        behind = torch.arange(self.tokens.shape[1], device=rows.device) >= ends[:, None]
        for x, nothing in ((self.tokens, self.pad_id), (self.logprobs, 0.0), (self.entropy, 0.0)):
            x[rows] = x[rows].masked_fill(behind, nothing)
        self.lengths[rows], self.finished[rows] = ends, True
        return stopped.cpu().numpy()

    def _leave(self, ended: np.ndarray) -> list[int]:
        """Take the slots [S] that have ended from their answers -> prompts that have no answer left."""
        if not ended.any():
            return []
        gone = self.slots.rows[ended]
        self.slots.keep(~ended)
        return self._ended(gone)

    def _ended(self, rows: np.ndarray) -> list[int]:
        """Prompts that have no answer left, which are forgotten."""
        np.subtract.at(self.left, rows // self.n, 1)
        done = [g for g in np.unique(rows // self.n).tolist() if self.left[g] == 0]
        self.slots.forget(done)
        return done

"""Sample with slots and a paged KV cache (continuous batching).

Prompts wait in a queue and are prefilled together; responses grow in slots by a token a step; a response that ends
frees its slot and pages for the next. On CPUs the host reads every token and lays out the next step without gaps. On
CUDA it reads every few steps; the steps in between all have one shape (cuda_graph_tables.py) and are replayed as a CUDA
graph (cuda_graphs.py).
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspo.rollout.cpu_weight_layout import laid_out_weights
from gspo.rollout.cuda_graph_tables import FixedStep, Tables
from gspo.rollout.cuda_graphs import Replay
from gspo.rollout.decoder_stack import fused_decoder_stack
from gspo.rollout.draw_tokens import draw
from gspo.rollout.engine_interface import EngineOptions, Requests, Results
from gspo.rollout.kept_keys import KeptKeys
from gspo.rollout.kv_budget import SHARE, free_bytes, most_slots, plan_slots, response_page_size
from gspo.rollout.shared_products import join_weights, shared_products
from gspo.rollout.slot_attention import check_slots, forward
from gspo.rollout.slots import Slots
from gspo.system.console import say

DRAWN_AT_ONCE = 256  # first tokens


@dataclass(frozen=True)
class Pace:
    """How the work is cut on one kind of device. It changes no response."""

    steps: int  # decoding steps between two reads of the host; 0: it reads every token
    prefill_ahead: int  # prompt tokens computed at once, if there is room: fewer make poor matrix products
    prefill_most: int  # ... and at most, unless one prompt is longer
    refill_share: float  # of the slots that are free before prompts are computed while others decode, which then wait


PACES = {
    "cpu": Pace(steps=0, prefill_ahead=256, prefill_most=2048, refill_share=0.0),  # more fall out of its caches
    "cuda": Pace(steps=8, prefill_ahead=4096, prefill_most=16384, refill_share=1 / 8),  # fewer leave it waiting
}


def pace_of(device: torch.device) -> Pace:
    """Return the pace for a device."""
    return PACES.get(device.type, PACES["cpu"])


class PagedEngine:
    """Sample with one model in slots; see `engine_interface.Engine` for the methods."""

    def __init__(self, model: nn.Module, device: torch.device, options: EngineOptions):
        self.model, self.device, self.options = model, device, options
        self._said = False
        join_weights(model, device)
        with shared_products(model):
            self.layout = check_slots(model, device, fixed=pace_of(device).steps > 0)

    def start(self, requests: Requests) -> "PagedGeneration":
        """Plan slots and pages for as many responses at a time as the memory holds, and allocate them."""
        options, longest, budget = self.options, requests.sampling.max_new_tokens, self._kv_bytes()
        plan = plan_slots(
            self.layout,
            [len(ids) for ids in requests.prompts],
            min(requests.counts),
            longest,
            most_slots(options.max_slots, self.device.type),
            budget,
            options.page or response_page_size(longest),
            rows=len(requests.keys),
        )
        if requests.kept is not None:
            room = budget - plan.tokens * sum(layer.token_bytes for layer in self.layout.values())
            self._share_memory(requests.kept, requests.trunks, room)
        return PagedGeneration(self.model, Slots(self.layout, plan, self.device), plan.slots, requests, options.agree)

    def _share_memory(self, kept: KeptKeys, trunks: tuple[int, ...], room: int) -> None:
        """Give what slots and pages leave of the memory to trunks that will be kept, or to those that were.

        So no trunk costs a slot. Branches of one that finds no room begin with a prompt, which a line says once.
        """
        kept.room = room
        if kept.bytes > room:
            kept.drop()
        missing = sum(row not in kept for row in trunks)
        if missing and not self._said:
            self._said = True
            say(
                f"note: rollout.kv_memory_gib has no room for the keys and values of {missing} of {len(trunks)} trunks "
                "beside the responses: the beginnings of their branches are computed once more."
            )

    def _kv_bytes(self) -> int:
        """Return the bytes that keys and values may take; the same on all ranks that share a tensor-parallel model."""
        options = self.options
        share = options.kv_memory_gib == "auto"
        budget = int(SHARE * free_bytes(self.device) if share else options.kv_memory_gib * 2**30)
        return budget if options.agree is None else int(options.agree(torch.tensor([budget], device=self.device)))


class PagedGeneration:
    """One batch of requests in `max_slots` slots; see `requests.Generation` for `run`, `progress` and `results`."""

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        max_slots: int,
        requests: Requests,
        agree: Callable[[Tensor], Tensor] | None = None,
    ):
        self.model, self.slots, self.max_slots, self.requests, self.agree = model, slots, max_slots, requests, agree
        self.prompts, counts, device = requests.prompts, np.array(requests.counts), slots.device
        self.prompt_of_row = np.repeat(np.arange(len(counts)), counts)
        self.first_row = counts.cumsum() - counts
        self.seen = np.array([seen for g in range(len(counts)) for seen in requests.seen(g)])  # tokens of the prompt
        # One spare row: idle slots write discarded tokens there.
        self.spare_row = len(requests.keys)
        start = Results.begin(requests, device, spare=1)
        self.tokens, self.lengths, self.finished = start.tokens, start.lengths, start.finished
        self.logprobs, self.entropy = start.logprobs, start.entropy
        self.begun = start.lengths.clone()  # tokens of each response that its prompt's pages hold
        self.kept = requests.kept
        self.trunks = {g: row for g, row in enumerate(requests.trunks) if row in requests.kept}
        if self.trunks:  # the last token of these beginnings goes through the first step, and is in no prompt's page
            held = np.isin(self.prompt_of_row, list(self.trunks))
            self.seen[held] -= 1
            self.begun[:-1] -= torch.from_numpy(held).to(self.begun)
        self.keys, self.limits = (F.pad(x, (0, 1)) for x in (requests.keys, requests.limits))
        self.pace = pace_of(device)
        if self.pace.steps:
            self.host_begun = self.begun.cpu().numpy()
            self.host_limits = (self.limits - self.begun).cpu().numpy()
            longest = requests.sampling.max_new_tokens
            self.tables = Tables(slots, max_slots, int(counts.max()), max(map(len, self.prompts)), longest)
            self.replay = Replay(device if device.type == "cuda" else None)
        self.queue = deque(sorted(range(len(self.prompts)), key=lambda g: len(self.prompts[g])))  # similar lengths
        self.waiting_rows: deque[int] = deque()  # first token drawn, no slot yet
        self.unfinished = counts.copy()  # responses to each prompt that have not ended

    def run(self, tick: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Sample everything; yield each prompt's number as soon as its last response has ended."""
        with (
            laid_out_weights(self.model, self.max_slots) as weights,
            fused_decoder_stack(self.model, weights, self.slots),
            shared_products(self.model),
        ):
            while self.queue or self.waiting_rows or len(self.slots):
                yield from self._fill_slots()
                if len(self.slots):
                    yield from self._decode()
                tick()

    def progress(self) -> tuple[int, int]:
        """Return (responses that have ended, tokens sampled so far)."""
        return len(self.requests.keys) - int(self.unfinished.sum()), int(self.lengths.sum()) - sum(self.requests.begun)

    def results(self) -> Results:
        """Return the results as they stand, without a copy and without the spare row."""
        kept = slice(self.spare_row)
        tensors = self.tokens, self.lengths, self.logprobs, self.entropy, self.finished
        return Results(*(x[kept] for x in tensors))

    def _fill_slots(self) -> Iterator[int]:
        """Seat waiting rows in free slots; prefill further prompts where too few rows wait."""
        while (room := self.max_slots - len(self.slots)) and (self.waiting_rows or self.queue):
            short = room - len(self.waiting_rows)
            if self._prefill_is_due(short) and (numbers := self._take_prompts(short)):
                if numbers := self._begin_like_trunks(numbers):
                    yield from self._prefill(numbers)
            elif self.waiting_rows:
                rows = [self.waiting_rows.popleft() for _ in range(min(room, len(self.waiting_rows)))]
                self.slots.seat(rows, self.prompt_of_row[rows].tolist(), self.seen[rows].tolist())
            else:
                return  # until a prompt frees its pages

    def _prefill_is_due(self, short: int) -> bool:
        """Tell whether to prefill prompts for slots that have no response, `short` of them beside those that wait.

        Every slot stands still meanwhile. So while some decode, it is put off until a share of them is free, or as many
        as the last prompts of the queue need.
        """
        if not len(self.slots):
            return short > 0
        last = int(self.unfinished[list(self.queue)].sum()) <= short
        return short > 0 and (last or short >= self.pace.refill_share * self.max_slots)

    def _take_prompts(self, rows: int) -> list[int]:
        """Take from the queue the prompts to prefill together: enough for `rows` further responses."""
        numbers: list[int] = []
        sizes: list[int] = []
        while self.queue:
            size = len(self.prompts[self.queue[0]])
            enough = self.unfinished[numbers].sum() >= rows and sum(sizes) >= self.pace.prefill_ahead
            if enough or not self.slots.fits([*sizes, size]) or (sizes and sum(sizes) + size > self.pace.prefill_most):
                break
            numbers.append(self.queue.popleft())
            sizes.append(size)
        return numbers

    def _begin_like_trunks(self, numbers: list[int]) -> list[int]:
        """Begin the responses to prompts whose trunks are kept: nothing is computed for them -> the other prompts."""
        like = [g for g in numbers if g in self.trunks]
        if like:
            sizes = [len(self.prompts[g]) - 1 for g in like]
            self.slots.begin_like([self.trunks[g] for g in like], self.kept, like, sizes)
            self.waiting_rows.extend(row for g in like for row in self.requests.rows(g))
        return [g for g in numbers if g not in self.trunks]

    def _prefill(self, numbers: list[int]) -> Iterator[int]:
        """Run the model over prompts, and draw the first token of all their responses."""
        prefill = self.slots.prefill(numbers, [self.prompts[g] for g in numbers])
        rows = np.concatenate([np.arange(self.unfinished[g]) + self.first_row[g] for g in numbers])
        ends = np.cumsum([0, *prefill.sizes[:-1]]).repeat(self.unfinished[numbers]) + self.seen[rows] - 1
        last, which = np.unique(ends, return_inverse=True)  # responses that begin alike draw from one distribution
        prefill.last = torch.from_numpy(last).to(prefill.last)
        logits, which = forward(self.model, prefill), torch.from_numpy(which).to(prefill.last)
        ended = np.zeros(len(rows), dtype=bool)
        for start in range(0, len(rows), DRAWN_AT_ONCE):
            part = slice(start, start + DRAWN_AT_ONCE)
            device_rows = torch.from_numpy(rows[part]).to(logits.device)
            position = self.begun[device_rows]
            last = self._draw_tokens(logits[which[part]], device_rows, position)
            ended[part] = self._read_finished(device_rows, position, last)
        self.waiting_rows.extend(rows[~ended].tolist())
        yield from self._count_ended(rows[ended])

    def _decode(self) -> Iterator[int]:
        """Draw further tokens for every slot, until the host reads them."""
        yield from self._decode_block() if self.pace.steps else self._decode_token()

    def _decode_token(self) -> Iterator[int]:
        """Draw one more token for every slot, and read it."""
        rows = torch.from_numpy(self.slots.rows).to(self.tokens.device)
        step = self.slots.step()
        position = self.begun[rows] + step.lengths
        logits = forward(self.model, step, self.tokens[rows, position - 1])
        last = self._draw_tokens(logits, rows, position)
        yield from self._free_slots(self._read_finished(rows, position, last))

    def _decode_block(self) -> Iterator[int]:
        """Draw up to `pace.steps` more tokens for every slot, then read them once."""
        slots, limits = self.slots, self.host_limits[self.slots.rows]
        first = slots.length + 1
        steps, count = min(self.pace.steps, int((limits - first).max())), self.tables.count()
        self.tables.load(count, np.minimum(slots.length + steps, limits - 1), spare_row=self.spare_row)
        for _ in range(steps):
            self.replay(self._fixed_step, count)
        rows, lengths = self.tables.read()
        ended = rows == self.spare_row
        if self.requests.stop is not None:
            ended |= self._trim_at_stop_strings(self.host_begun[self.slots.rows] + first)
        slots.length = lengths
        yield from self._free_slots(ended)

    def _fixed_step(self, count: int) -> None:
        """Draw one more token for the first `count` slots of the tables, without waiting for the device."""
        step = FixedStep(self.tables, count)
        position = self.begun[step.rows] + step.lengths
        logits = forward(self.model, step, self.tokens[step.rows, position - 1])
        last = self._draw_tokens(logits, step.rows, position)
        rows = step.rows.masked_fill(last, self.spare_row)
        step.lengths.add_(rows != self.spare_row)
        step.rows.copy_(rows)

    def _draw_tokens(self, logits: Tensor, rows: Tensor, position: Tensor) -> Tensor:
        """Draw a token from each of logits [S, V] and write it at `position` [S] of `rows` [S].

        -> [S] bool, whether it is its response's last; stop strings are not looked at.
        """
        token, logprob, entropy = draw(logits, self.keys[rows], position, self.requests.sampling)
        if self.agree is not None:
            token = self.agree(token)
        self.tokens[rows, position], self.logprobs[rows, position] = token, logprob
        self.entropy[rows, position], self.lengths[rows] = entropy, position + 1
        finished = (token[:, None] == self.requests.end_ids).any(-1)
        self.finished[rows] = finished
        return finished | (position + 1 >= self.limits[rows])

    def _read_finished(self, rows: Tensor, position: Tensor, last: Tensor) -> np.ndarray:
        """Copy to the host which responses ended with the token at `position` [S] of `rows` [S]: [S] bool.

        `last` [S] says so of end tokens and limits; stop strings are looked for here.
        """
        if self.requests.stop is not None:
            stopped = self.requests.stop.ends(self.tokens, rows, position, position + 1) > 0
            self.finished[rows] |= stopped
            last = last | stopped
        return last.cpu().numpy()

    def _trim_at_stop_strings(self, first: np.ndarray) -> np.ndarray:
        """Cut the responses in which a stop string was completed at or behind position `first` [S]: [S] bool."""
        rows = torch.from_numpy(self.slots.rows).to(self.tokens.device)
        ends = self.requests.stop.ends(self.tokens, rows, torch.from_numpy(first).to(rows), self.lengths[rows])
        stopped = ends > 0
        rows, ends = rows[stopped], ends[stopped]
        behind = torch.arange(self.tokens.shape[1], device=rows.device) >= ends[:, None]
        for x, padding in ((self.tokens, self.requests.pad_id), (self.logprobs, 0.0), (self.entropy, 0.0)):
            x[rows] = x[rows].masked_fill(behind, padding)
        self.lengths[rows], self.finished[rows] = ends, True
        return stopped.cpu().numpy()

    def _free_slots(self, ended: np.ndarray) -> list[int]:
        """Free the slots whose responses have ended, `ended` [S] -> prompts all of whose responses have."""
        if not ended.any():
            return []
        rows = self.slots.rows[ended]
        if self.kept is not None and not self.requests.trunks:
            self.slots.copy_ended(ended, self.kept)
        self.slots.keep(~ended)
        return self._count_ended(rows)

    def _count_ended(self, rows: np.ndarray) -> list[int]:
        """Count rows that have ended -> prompts all of whose responses have; their pages are freed."""
        prompts = self.prompt_of_row[rows]
        np.subtract.at(self.unfinished, prompts, 1)
        done = [g for g in np.unique(prompts).tolist() if self.unfinished[g] == 0]
        self.slots.forget(done)
        return done

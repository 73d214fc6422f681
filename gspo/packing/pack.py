"""Rows of a rollout as one sequence without padding, in which the responses to a prompt share it, and one another's
beginnings.

`[P_1 | P_2 | ... | R_1i | R_1j | ... | R_2i | ...]`: the prompts of the groups that have rows in the pack, then their
responses; positions restart at |P| for every response. Linear layers see each real token once, and a token that
several responses to a prompt have behind the same tokens only in one of them. Only attention needs rows again: it
gathers them by the slots kept here, or attends inside the segments kept here.
"""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from gspo.kernels.rows import Rows
from gspo.kernels.varlen import Segments
from gspo.packing.micro_batches import Row
from gspo.types import Prompt, Rollout


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """T packed tokens: B prompts and R responses of M tokens, of which the pack holds the D that are different, in rows
    of R' responses: one that another begins with needs none.

    P and L are the longest prompt and response, K the longest prompt and response together. A slot is a place in the
    pack; where a row is shorter than its tensor, the row's last slot is repeated. Segments speak of A = T - D + M
    places: of a pack in which every response has all its tokens.
    """

    ids: Tensor  # [1, T]
    positions: Tensor  # [1, T]
    prompt_slots: Tensor  # [B, P]
    response_slots: Tensor  # [R', L]
    sequence_slots: Tensor  # [R', K], each response behind its prompt: the index is the position
    response_positions: Tensor  # [R', L]
    unpadded: Tensor  # [T], each packed token's index in [B * P prompt tokens, R' * L response tokens]
    targets: Tensor  # [D], the response tokens of the pack
    scored_by: Tensor  # [D], the slot whose hidden state scores each: the token before it
    mask: Tensor  # [R, L] bool, true on real tokens
    slots: Tensor | None  # [A], the slot of every token of the prompts and responses; None where all are different
    held: Tensor | None  # [T], the other way: the first place of each
    prompt_tokens: int  # the responses lie behind them
    inside: Segments  # B + R, causal: every prompt, every response
    across: Segments  # B: the responses to a prompt, and the prompt
    sequence_places: Tensor  # [R, K], each response behind its prompt, in A
    behind: Tensor  # [R], the length of each response's prompt
    _visible: dict[int | None, Tensor] = field(default_factory=dict, repr=False)
    _within: dict[int, tuple[Tensor, Segments]] = field(default_factory=dict, repr=False)

    def visible(self, window: int | None) -> Tensor:
        """[R', 1, L, K] bool: which tokens of its own sequence a response token attends to, itself included."""
        if window not in self._visible:
            query = self.response_positions[:, None, :, None]
            key = torch.arange(self.sequence_slots.shape[1], device=query.device)
            seen = key <= query
            self._visible[window] = seen if window is None else seen & (key > query - window)
        return self._visible[window]

    @cached_property
    def rows(self) -> Rows:
        """The prompts, then the rows of responses, as compiled code wants them (kernels/rows.py)."""
        prompts, width = self.prompt_slots.shape
        place, at = self.unpadded.numpy(), self.positions[0].numpy()
        behind = place - prompts * width
        row = np.where(behind < 0, place // width, prompts + behind // self.response_slots.shape[1])
        queries = np.lexsort((at, row))
        asking = np.bincount(row)
        sizes = at[queries[asking.cumsum() - 1]] + 1
        keys = [
            x.numpy()[np.arange(x.shape[1]) < n[:, None]]
            for x, n in zip((self.prompt_slots, self.sequence_slots), np.split(sizes, [prompts]), strict=True)
        ]
        return Rows.of(np.concatenate(keys), sizes, queries, asking, at[queries])

    def to(self, device: torch.device) -> "PackedBatch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: x.to(device) for name, x in tensors.items() if isinstance(x, Tensor)})

    @property
    def twins(self) -> Tensor | None:
        """[M]: which of the D each token of the responses is."""
        return None if self.slots is None else self.slots[self.prompt_tokens :] - self.prompt_tokens

    def within(self, window: int) -> tuple[Tensor, Segments]:
        """Places [S] in A of the keys that prompts and responses reach by a window, B + R causal segments over them.

        Those of a prompt are its own tokens, those of a response the last window - 1 of its prompt, then its own.
        """
        if window not in self._within:
            start = self.behind[:, None]
            at = torch.arange(self.sequence_places.shape[1], device=start.device)
            reached = (at > start - window) & (at < start + self.mask.sum(1, keepdim=True))
            places = torch.cat([torch.arange(self.prompt_tokens, device=start.device), self.sequence_places[reached]])
            queries = self.inside.queries.diff().cpu()
            keys = torch.cat([queries[: len(self.prompt_slots)], reached.sum(1).cpu()])
            self._within[window] = places, Segments.of(queries, keys, True, window, start.device)
        return self._within[window]


def pack(prompts: list[Prompt], owners: list[int], tokens: Tensor, lengths: Tensor) -> PackedBatch:
    """prompts (B), owners (R, ascending: whose response a row is), tokens [R, L], lengths [R] -> a pack.

    Every prompt and every response has a token, and every prompt a response.
    """
    device = tokens.device
    p = torch.tensor([len(prompt.ids) for prompt in prompts])
    owner, n = torch.tensor(owners), lengths.cpu()
    count = int(p.sum())
    prompt_starts = p.cumsum(0) - p
    row_starts = count + n.cumsum(0) - n

    at = torch.arange(int((p[owner] + n).max()))  # positions in a row
    prompt_at, response_at = at[: int(p.max())], at[: int(n.max())]
    prompt_mask, mask = prompt_at < p[:, None], response_at < n[:, None]
    prompt_slots = prompt_starts[:, None] + torch.minimum(prompt_at, p[:, None] - 1)
    response_at = torch.minimum(response_at, n[:, None] - 1)
    response_places = row_starts[:, None] + response_at
    in_prompt = at < p[owner, None]
    own = row_starts[:, None] + torch.minimum(at - p[owner, None], n[:, None] - 1)
    sequence_places = torch.where(in_prompt, prompt_starts[owner, None] + at, own)
    response_positions = p[owner, None] + response_at
    scored_by = torch.cat([prompt_starts[owner, None] + p[owner, None] - 1, response_places[:, :-1]], 1)[mask]
    unpadded = torch.cat([prompt_mask.flatten(), mask.flatten()]).nonzero().squeeze(1)
    positions = torch.cat([prompt_at.expand_as(prompt_mask)[prompt_mask], response_positions[mask]])
    prompt_ids = torch.tensor(list(chain.from_iterable(prompt.ids for prompt in prompts)))
    ids = torch.cat([prompt_ids, tokens.cpu()[:, : mask.shape[1]][mask]])

    answered = torch.zeros_like(p).index_add(0, owner, n)  # response tokens of each prompt
    lengths = torch.cat([p, n])
    whole = PackedBatch(
        ids=ids[None],
        positions=positions[None],
        prompt_slots=prompt_slots,
        response_slots=response_places,
        sequence_slots=sequence_places,
        response_positions=response_positions,
        unpadded=unpadded,
        targets=ids[count:],
        scored_by=scored_by,
        mask=mask,
        slots=None,
        held=None,
        prompt_tokens=count,
        inside=Segments.of(lengths, lengths, causal=True, device=device),
        across=Segments.of(answered, p, device=device),
        sequence_places=sequence_places,
        behind=p[owner],
    )
    return _without_twins(whole, owners, n).to(device)


def _without_twins(whole: PackedBatch, owners: list[int], n: Tensor) -> PackedBatch:
    """The pack with one of each of the tokens that are the same behind the same tokens, and rows for these only."""
    slots, held = _different(owners, whole.targets, n, whole.prompt_tokens)
    if slots is None:
        return whole
    of_prompts, width = whole.prompt_slots.numel(), whole.mask.shape[1]
    unpadded, mine = whole.unpadded[held], held[whole.prompt_tokens :] - whole.prompt_tokens
    row = (unpadded[whole.prompt_tokens :] - of_prompts) // width
    rows, which = row.unique(return_inverse=True)
    unpadded[whole.prompt_tokens :] += (which - row) * width
    return replace(
        whole,
        ids=whole.ids[:, held],
        positions=whole.positions[:, held],
        response_slots=slots[whole.response_slots[rows]],
        sequence_slots=slots[whole.sequence_slots[rows]],
        response_positions=whole.response_positions[rows],
        unpadded=unpadded,
        targets=whole.targets[mine],
        scored_by=slots[whole.scored_by[mine]],
        slots=slots,
        held=held,
    )


def _different(owners: list[int], tokens: Tensor, n: Tensor, before: int) -> tuple[Tensor | None, Tensor | None]:
    """Responses tokens [M], one behind the other, n [R] of each, behind `before` others -> (`slots`, `held`).

    Two tokens are one if the responses are of the same owner and equal up to them. In alphabetical order, responses
    that begin alike are neighbours, and a token is new where its response differs from the one above.
    """
    rows = tokens.numpy().astype(">u4")  # as bytes they compare as they do
    texts = [x.tobytes() for x in np.split(rows, n.cumsum(0)[:-1].numpy())]
    order = sorted(range(len(texts)), key=lambda r: (owners[r], texts[r]))
    width, table = int(n.max()), np.zeros((len(texts), int(n.max())), dtype=np.int64)
    mask = np.arange(width) < n.numpy()[:, None]
    table[mask] = tokens.numpy()
    table, mask, owner = table[order], mask[order], np.array(owners)[order]
    like = (table[1:] == table[:-1]) & mask[1:] & mask[:-1] & (owner[1:] == owner[:-1])[:, None]
    new = np.ones_like(mask)
    new[1:] = ~np.logical_and.accumulate(like, axis=1)
    if new[mask].all():
        return None, None
    first = np.maximum.accumulate(np.where(new, np.arange(len(new))[:, None], 0), axis=0)
    names = np.empty_like(first)
    names[order] = first * width + np.arange(width)
    back = np.empty_like(mask)
    back[order] = mask
    _, where, which = np.unique(names[back], return_index=True, return_inverse=True)
    rank = where.argsort().argsort()  # the pack holds the first of equals, in the order of the rows
    prompts, where = torch.arange(before), torch.from_numpy(np.sort(where))
    return torch.cat([prompts, before + torch.from_numpy(rank[which])]), torch.cat([prompts, before + where])


def pack_rows(rollout: Rollout, rows: list[Row]) -> PackedBatch:
    """These rows of a rollout, those of one group side by side."""
    g, i = (list(x) for x in zip(*rows, strict=True))
    groups = sorted(set(g), key=g.index)
    place = {group: k for k, group in enumerate(groups)}
    return pack(
        [rollout.prompts[k] for k in groups], [place[k] for k in g], rollout.tokens[g, i], rollout.lengths[g, i]
    )

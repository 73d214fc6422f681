"""Rows of a rollout as one sequence without padding, in which the responses to a prompt share it.

`[P_1 | P_2 | ... | R_1i | R_1j | ... | R_2i | ...]`: the prompts of the groups that have rows in the pack, then their
responses; positions restart at |P| for every response. Linear layers see each real token once. Only attention needs
rows again: it gathers them by the slots kept here, or attends inside the segments kept here.
"""

from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from gspo.batching import Row
from gspo.types import Prompt, Rollout
from kernels.varlen import Segments


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """T packed tokens: B prompts and R responses, of which M tokens are response tokens.

    P and L are the longest prompt and response, K the longest prompt and response together. A slot is a place in the
    pack; where a row is shorter than its tensor, the row's last slot is repeated.
    """

    ids: Tensor  # [1, T]
    positions: Tensor  # [1, T]
    prompt_slots: Tensor  # [B, P]
    response_slots: Tensor  # [R, L]
    sequence_slots: Tensor  # [R, K], each response behind its prompt: the index is the position
    response_positions: Tensor  # [R, L]
    unpadded: Tensor  # [T], each packed token's index in [B * P prompt tokens, R * L response tokens]
    targets: Tensor  # [M], response tokens, row by row
    scored_by: Tensor  # [M], the slot whose hidden state scores each: the token before it
    mask: Tensor  # [R, L] bool, true on real tokens
    prompt_tokens: int  # the responses lie behind them
    inside: Segments  # B + R of the pack, causal: every prompt, every response
    across: Segments  # B: the responses to a prompt, and the prompt
    _visible: dict[int | None, Tensor] = field(default_factory=dict, repr=False)
    _within: dict[int, tuple[Tensor, Segments]] = field(default_factory=dict, repr=False)

    def visible(self, window: int | None) -> Tensor:
        """[R, 1, L, K] bool: which tokens of its own sequence a response token attends to, itself included."""
        if window not in self._visible:
            query = self.response_positions[:, None, :, None]
            key = torch.arange(self.sequence_slots.shape[1], device=query.device)
            seen = key <= query
            self._visible[window] = seen if window is None else seen & (key > query - window)
        return self._visible[window]

    def within(self, window: int) -> tuple[Tensor, Segments]:
        """Slots [S] of the keys that prompts and responses reach by a window, and B + R causal segments over them.

        Those of a prompt are its own tokens, those of a response the last window - 1 of its prompt, then its own.
        """
        if window not in self._within:
            start = self.response_positions[:, :1]
            at = torch.arange(self.sequence_slots.shape[1], device=start.device)
            reached = (at > start - window) & (at < start + self.mask.sum(1, keepdim=True))
            slots = torch.cat([torch.arange(self.prompt_tokens, device=start.device), self.sequence_slots[reached]])
            queries = self.inside.queries.diff().cpu()
            keys = torch.cat([queries[: len(self.prompt_slots)], reached.sum(1).cpu()])
            self._within[window] = slots, Segments.of(queries, keys, True, window, start.device)
        return self._within[window]


def pack(prompts: list[Prompt], owners: list[int], tokens: Tensor, lengths: Tensor) -> PackedBatch:
    """prompts (B), owners (R, ascending: whose response a row is), tokens [R, L], lengths [R] -> a pack.

    Every prompt and every response has a token, and every prompt a response.
    """
    device = tokens.device
    p = torch.tensor([len(prompt.ids) for prompt in prompts])
    owner, n = torch.tensor(owners), lengths.cpu()
    prompt_starts = p.cumsum(0) - p
    row_starts = p.sum() + n.cumsum(0) - n

    at = torch.arange(int((p[owner] + n).max()))  # positions in a row
    prompt_at, response_at = at[: int(p.max())], at[: int(n.max())]
    prompt_mask, mask = prompt_at < p[:, None], response_at < n[:, None]
    prompt_slots = prompt_starts[:, None] + torch.minimum(prompt_at, p[:, None] - 1)
    response_at = torch.minimum(response_at, n[:, None] - 1)
    response_slots = row_starts[:, None] + response_at
    in_prompt = at < p[owner, None]
    own = row_starts[:, None] + torch.minimum(at - p[owner, None], n[:, None] - 1)
    sequence_slots = torch.where(in_prompt, prompt_starts[owner, None] + at, own)
    response_positions = p[owner, None] + response_at
    scored_by = torch.cat([prompt_starts[owner, None] + p[owner, None] - 1, response_slots[:, :-1]], 1)[mask]

    unpadded = torch.cat([prompt_mask.flatten(), mask.flatten()]).nonzero().squeeze(1)
    positions = torch.cat([prompt_at.expand_as(prompt_mask)[prompt_mask], response_positions[mask]])
    answered = torch.zeros_like(p).index_add(0, owner, n)  # response tokens of each prompt
    lengths = torch.cat([p, n])
    prompt_ids = torch.tensor(list(chain.from_iterable(prompt.ids for prompt in prompts)), device=device)
    mask = mask.to(device)
    targets = tokens[:, : mask.shape[1]][mask]
    return PackedBatch(
        ids=torch.cat([prompt_ids, targets])[None],
        positions=positions.to(device)[None],
        prompt_slots=prompt_slots.to(device),
        response_slots=response_slots.to(device),
        sequence_slots=sequence_slots.to(device),
        response_positions=response_positions.to(device),
        unpadded=unpadded.to(device),
        targets=targets,
        scored_by=scored_by.to(device),
        mask=mask,
        prompt_tokens=len(prompt_ids),
        inside=Segments.of(lengths, lengths, causal=True, device=device),
        across=Segments.of(answered, p, device=device),
    )


def pack_rows(rollout: Rollout, rows: list[Row]) -> PackedBatch:
    """These rows of a rollout, those of one group side by side."""
    g, i = (list(x) for x in zip(*rows, strict=True))
    groups = sorted(set(g), key=g.index)
    place = {group: k for k, group in enumerate(groups)}
    return pack(
        [rollout.prompts[k] for k in groups], [place[k] for k in g], rollout.tokens[g, i], rollout.lengths[g, i]
    )

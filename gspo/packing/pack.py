"""Pack prompts and responses into one sequence without padding, in which tokens that responses share stand once.

    [ prompt 0 | prompt 1 | ... | responses to prompt 0 | responses to prompt 1 | ... ]

Positions restart at the prompt's length for every response. Linear layers see each token once: a prompt once for its
whole group, and a token that several responses to a prompt have after the same beginning once for all of them. Only
attention needs the responses one by one again: it gathers them by the indices kept here, or attends within the
segments kept here.

Two groups as an example, letters for token ids. To prompt `abc` the responses are `pq` and `ps`, to prompt `d` it is
`tu`. The token p is packed once:

    index              0  1  2  3  4  5  6  7  8
    ids                a  b  c  d  p  q  s  t  u
    positions          0  1  2  0  3  4  4  1  2
    targets                        p  q  s  t  u     the response tokens
    scored_by                      2  4  4  3  7     index of the token whose hidden state predicts each
    prompt_index       [[0, 1, 2], [3, 3, 3]]
    response_index     [[4, 5], [4, 6], [7, 8]]
    sequence_index     [[0, 1, 2, 4, 5], [0, 1, 2, 4, 6], [3, 7, 8, 8, 8]]
    token_of_response  [0, 1, 0, 2, 3, 4]            p q p s t u, as indices of targets

Before p was merged, the pack was `a b c d p q p s t u`:

    merged_index           [0, 1, 2, 3, 4, 5, 4, 6, 7, 8]
    unmerged_index         [0, 1, 2, 3, 4, 5, 7, 8, 9]
    prompts_and_responses  segments of 3, 1, 2, 2, 2 tokens, each attends causally to itself
    responses_to_prompts   4 queries see the 3 tokens abc, 2 queries the token d
"""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from gspo.kernels.packed_attention_cpu import Rows
from gspo.kernels.segment_attention import Segments
from gspo.packing.micro_batches import Row
from gspo.types import Prompt, Rollout


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A pack; the module's docstring has an example.

    Sizes: T packed tokens, of B prompts (the longest has P tokens) and R responses (the longest L, with its prompt K)
    that have M tokens together, D of them different. R' <= R: a response that another begins with has no row of its
    own. U = T - D + M tokens before merging. An index is a token's place in the pack; a row that is shorter than its
    tensor repeats its last index.
    """

    ids: Tensor  # [1, T]
    positions: Tensor  # [1, T]
    prompt_index: Tensor  # [B, P]
    response_index: Tensor  # [R', L]
    sequence_index: Tensor  # [R', K], each response after its prompt: the column is the position
    response_positions: Tensor  # [R', L]
    padded_index: Tensor  # [T], where each token lies in [B * P prompt tokens, R' * L response tokens]
    targets: Tensor  # [D], the response tokens of the pack
    scored_by: Tensor  # [D], the token whose hidden state scores each: the one before it
    mask: Tensor  # [R, L] bool, true on real tokens
    merged_index: Tensor | None  # [U], each unmerged token's index in the pack; None where nothing was merged
    unmerged_index: Tensor | None  # [T], the other way round: the first of the unmerged tokens that became each
    prompt_tokens: int  # of all B prompts; the responses lie after them
    prompts_and_responses: Segments  # B + R of the unmerged pack, causal
    responses_to_prompts: Segments  # B: the queries of all responses to a prompt, over the prompt's keys
    unmerged_sequence_index: Tensor  # [R, K], each response after its prompt, in the unmerged pack
    prompt_lengths: Tensor  # [R], of each response's prompt
    _visible: dict[int | None, Tensor] = field(default_factory=dict, repr=False)
    _window_segments: dict[int, tuple[Tensor, Segments]] = field(default_factory=dict, repr=False)

    @property
    def token_of_response(self) -> Tensor | None:
        """[M]: which of the D packed tokens each response token is; None where all are different."""
        return None if self.merged_index is None else self.merged_index[self.prompt_tokens :] - self.prompt_tokens

    def visible(self, window: int | None) -> Tensor:
        """[R', 1, L, K] bool: which tokens of its own sequence a response token attends to, itself included."""
        if window not in self._visible:
            query = self.response_positions[:, None, :, None]
            key = torch.arange(self.sequence_index.shape[1], device=query.device)
            seen = key <= query
            self._visible[window] = seen if window is None else seen & (key > query - window)
        return self._visible[window]

    def window_segments(self, window: int) -> tuple[Tensor, Segments]:
        """Return the keys [S] that prompts and responses reach with a sliding window, and B + R causal segments.

        Keys are indices of the unmerged pack. A prompt's are its own tokens; a response's are the last window - 1 of
        its prompt, then its own.
        """
        if window not in self._window_segments:
            start = self.prompt_lengths[:, None]
            position = torch.arange(self.unmerged_sequence_index.shape[1], device=start.device)
            reached = (position > start - window) & (position < start + self.mask.sum(1, keepdim=True))
            prompts = torch.arange(self.prompt_tokens, device=start.device)
            keys = torch.cat([prompts, self.unmerged_sequence_index[reached]])
            query_counts = self.prompts_and_responses.queries.diff().cpu()
            key_counts = torch.cat([query_counts[: len(self.prompt_index)], reached.sum(1).cpu()])
            segments = Segments.of(query_counts, key_counts, True, window, start.device)
            self._window_segments[window] = keys, segments
        return self._window_segments[window]

    @cached_property
    def rows(self) -> Rows:
        """Return the prompts, then the rows of responses, as kernels/packed_attention_cpu.py takes them."""
        prompts, width = self.prompt_index.shape
        padded, position = self.padded_index.numpy(), self.positions[0].numpy()
        in_responses = padded - prompts * width
        row = np.where(in_responses < 0, padded // width, prompts + in_responses // self.response_index.shape[1])
        queries = np.lexsort((position, row))
        counts = np.bincount(row)
        sizes = position[queries[counts.cumsum() - 1]] + 1
        keys = [
            x.numpy()[np.arange(x.shape[1]) < n[:, None]]
            for x, n in zip((self.prompt_index, self.sequence_index), np.split(sizes, [prompts]), strict=True)
        ]
        return Rows.of(np.concatenate(keys), sizes, queries, counts, position[queries])

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the pack with its tensors on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: x.to(device) for name, x in tensors.items() if isinstance(x, Tensor)})


def pack_rows(rollout: Rollout, rows: list[Row]) -> PackedBatch:
    """Pack these rows (group, response) of a rollout; rows of one group stand side by side."""
    g, i = (list(x) for x in zip(*rows, strict=True))
    groups = sorted(set(g), key=g.index)
    number = {group: k for k, group in enumerate(groups)}
    prompts = [rollout.prompts[k] for k in groups]
    return pack(prompts, [number[k] for k in g], rollout.tokens[g, i], rollout.lengths[g, i])


def pack(prompts: list[Prompt], owners: list[int], tokens: Tensor, lengths: Tensor) -> PackedBatch:
    """Pack B prompts and R responses `tokens` [R, L] of `lengths` [R]; owners (R, ascending) name each one's prompt.

    Every prompt and every response has a token, and every prompt a response.
    """
    device = tokens.device
    p = torch.tensor([len(prompt.ids) for prompt in prompts])
    owner, n = torch.tensor(owners), lengths.cpu()
    prompt_tokens = int(p.sum())
    prompt_start = p.cumsum(0) - p
    response_start = prompt_tokens + n.cumsum(0) - n

    column = torch.arange(int((p[owner] + n).max()))
    prompt_column, response_column = column[: int(p.max())], column[: int(n.max())]
    prompt_mask, mask = prompt_column < p[:, None], response_column < n[:, None]
    prompt_index = prompt_start[:, None] + torch.minimum(prompt_column, p[:, None] - 1)
    response_column = torch.minimum(response_column, n[:, None] - 1)
    response_index = response_start[:, None] + response_column
    in_response = response_start[:, None] + torch.minimum(column - p[owner, None], n[:, None] - 1)
    sequence_index = torch.where(column < p[owner, None], prompt_start[owner, None] + column, in_response)
    response_positions = p[owner, None] + response_column

    last_of_prompt = prompt_start[owner, None] + p[owner, None] - 1
    prompt_ids = torch.tensor(list(chain.from_iterable(prompt.ids for prompt in prompts)))
    ids = torch.cat([prompt_ids, tokens.cpu()[:, : mask.shape[1]][mask]])
    positions = torch.cat([prompt_column.expand_as(prompt_mask)[prompt_mask], response_positions[mask]])
    both = torch.cat([p, n])
    responses_to_each = torch.zeros_like(p).index_add(0, owner, n)  # tokens
    unmerged = PackedBatch(
        ids=ids[None],
        positions=positions[None],
        prompt_index=prompt_index,
        response_index=response_index,
        sequence_index=sequence_index,
        response_positions=response_positions,
        padded_index=torch.cat([prompt_mask.flatten(), mask.flatten()]).nonzero().squeeze(1),
        targets=ids[prompt_tokens:],
        scored_by=torch.cat([last_of_prompt, response_index[:, :-1]], 1)[mask],
        mask=mask,
        merged_index=None,
        unmerged_index=None,
        prompt_tokens=prompt_tokens,
        prompts_and_responses=Segments.of(both, both, causal=True, device=device),
        responses_to_prompts=Segments.of(responses_to_each, p, device=device),
        unmerged_sequence_index=sequence_index,
        prompt_lengths=p[owner],
    )
    return _merge_shared_tokens(unmerged, owners, n).to(device)


def _merge_shared_tokens(pack: PackedBatch, owners: list[int], n: Tensor) -> PackedBatch:
    """Keep one of each of the tokens that responses share, and rows of responses only where they have tokens of their
    own; n [R] are the responses' lengths."""
    merged, unmerged = _merged_indices(owners, pack.targets, n, pack.prompt_tokens)
    if merged is None:
        return pack
    padded_prompts, width = pack.prompt_index.numel(), pack.mask.shape[1]
    padded = pack.padded_index[unmerged]
    row = (padded[pack.prompt_tokens :] - padded_prompts) // width
    rows, new_row = row.unique(return_inverse=True)
    padded[pack.prompt_tokens :] += (new_row - row) * width
    kept = unmerged[pack.prompt_tokens :] - pack.prompt_tokens
    return replace(
        pack,
        ids=pack.ids[:, unmerged],
        positions=pack.positions[:, unmerged],
        response_index=merged[pack.response_index[rows]],
        sequence_index=merged[pack.sequence_index[rows]],
        response_positions=pack.response_positions[rows],
        padded_index=padded,
        targets=pack.targets[kept],
        scored_by=merged[pack.scored_by[kept]],
        merged_index=merged,
        unmerged_index=unmerged,
    )


def _merged_indices(
    owners: list[int], tokens: Tensor, n: Tensor, prompt_tokens: int
) -> tuple[Tensor | None, Tensor | None]:
    """Find the response tokens that are the same -> `merged_index` and `unmerged_index`; None where all differ.

    tokens [M], one response after the other, of lengths n [R]. Two tokens are the same if their responses have the same
    owner and are equal up to and including them.
    """
    order = _alphabetical(owners, tokens, n)
    mask = np.arange(int(n.max())) < n.numpy()[:, None]
    table = np.zeros(mask.shape, dtype=np.int64)
    table[mask] = tokens.numpy()
    is_first, first_row = _first_of_equals(table[order], mask[order], np.array(owners)[order])
    if is_first[mask[order]].all():
        return None, None

    # Name each token by the row and column of the first one that is the same, in the order of the responses again.
    names = np.empty_like(first_row)
    names[order] = first_row * mask.shape[1] + np.arange(mask.shape[1])
    _, first, number = np.unique(names[mask], return_index=True, return_inverse=True)

    # The pack keeps the first token of each name, in the order in which they come: np.unique sorts by name instead.
    rank = torch.from_numpy(first.argsort().argsort()[number])
    prompts, kept = torch.arange(prompt_tokens), torch.from_numpy(np.sort(first))
    return torch.cat([prompts, prompt_tokens + rank]), torch.cat([prompts, prompt_tokens + kept])


def _alphabetical(owners: list[int], tokens: Tensor, n: Tensor) -> list[int]:
    """Sort responses by owner, then by tokens -> their numbers. Those that begin alike become neighbours."""
    big_endian = tokens.numpy().astype(">u4")  # whose bytes compare as the numbers do
    texts = [x.tobytes() for x in np.split(big_endian, n.cumsum(0)[:-1].numpy())]
    return sorted(range(len(texts)), key=lambda r: (owners[r], texts[r]))


def _first_of_equals(table: np.ndarray, mask: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compare each response with the one above -> [R, L] whether a token is the first of its kind, and that one's row.

    table [R, L] tokens, mask [R, L] and owner [R], all in alphabetical order.
    """
    equal = (table[1:] == table[:-1]) & mask[1:] & mask[:-1] & (owner[1:] == owner[:-1])[:, None]
    is_first = np.ones_like(mask)
    is_first[1:] = ~np.logical_and.accumulate(equal, axis=1)
    row = np.where(is_first, np.arange(len(is_first))[:, None], 0)
    return is_first, np.maximum.accumulate(row, axis=0)

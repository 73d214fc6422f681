"""A pack: every real token once, each response behind its own prompt, scored by the token before it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo.packing.pack import pack, pack_rows
from gspo.types import Prompt, Rollout

PROMPTS = [Prompt(0, (10, 11, 12), "", "", ""), Prompt(1, (20,), "", "", "")]
TOKENS = torch.tensor([[30, 31, 0], [40, 0, 0], [50, 51, 52]])
LENGTHS = torch.tensor([2, 1, 3])


def test_the_example_of_the_docstring():
    """Two groups; the first two responses share their first token."""
    letters = [Prompt(0, tuple(map(ord, "abc")), "", "", ""), Prompt(1, (ord("d"),), "", "", "")]
    tokens = torch.tensor([list(map(ord, text)) for text in ("pq", "ps", "tu")])
    packed = pack(letters, [0, 0, 1], tokens, torch.tensor([2, 2, 2]))
    assert "".join(map(chr, packed.ids[0].tolist())) == "abcdpqstu"
    assert packed.positions.tolist() == [[0, 1, 2, 0, 3, 4, 4, 1, 2]]
    assert "".join(map(chr, packed.targets.tolist())) == "pqstu" and packed.scored_by.tolist() == [2, 4, 4, 3, 7]
    assert packed.prompt_index.tolist() == [[0, 1, 2], [3, 3, 3]]
    assert packed.response_index.tolist() == [[4, 5], [4, 6], [7, 8]]
    assert packed.sequence_index.tolist() == [[0, 1, 2, 4, 5], [0, 1, 2, 4, 6], [3, 7, 8, 8, 8]]
    assert packed.token_of_response.tolist() == [0, 1, 0, 2, 3, 4]
    assert packed.merged_index.tolist() == [0, 1, 2, 3, 4, 5, 4, 6, 7, 8]
    assert packed.unmerged_index.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert packed.prompts_and_responses.queries.diff().tolist() == [3, 1, 2, 2, 2]
    over = packed.responses_to_prompts
    assert over.queries.diff().tolist() == [4, 2] and over.keys.diff().tolist() == [3, 1]


def test_a_pack_by_hand():
    packed = pack(PROMPTS, [0, 0, 1], TOKENS, LENGTHS)
    assert packed.ids.tolist() == [[10, 11, 12, 20, 30, 31, 40, 50, 51, 52]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 3, 4, 3, 1, 2, 3]]
    assert packed.targets.tolist() == [30, 31, 40, 50, 51, 52]
    assert packed.scored_by.tolist() == [2, 4, 2, 3, 7, 8]
    assert packed.prompt_index.tolist() == [[0, 1, 2], [3, 3, 3]]
    assert packed.response_index.tolist() == [[4, 5, 5], [6, 6, 6], [7, 8, 9]]
    assert packed.sequence_index.tolist() == [[0, 1, 2, 4, 5], [0, 1, 2, 6, 6], [3, 7, 8, 9, 9]]
    assert packed.padded_index.tolist() == [0, 1, 2, 3, 6, 7, 9, 12, 13, 14]
    assert packed.mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]


def test_the_segments_of_a_pack_by_hand():
    packed = pack(PROMPTS, [0, 0, 1], TOKENS, LENGTHS)
    assert packed.prompt_tokens == 4
    own, prompts = packed.prompts_and_responses, packed.responses_to_prompts
    assert own.queries.tolist() == own.keys.tolist() == [0, 3, 4, 6, 7, 10]
    assert prompts.queries.tolist() == [0, 3, 6] and prompts.keys.tolist() == [0, 3, 4]
    assert (own.longest_query, prompts.longest_query, prompts.longest_key) == (3, 3, 3)
    keys, near = packed.window_segments(2)
    assert keys.tolist() == [0, 1, 2, 3, 2, 4, 5, 2, 6, 3, 7, 8, 9], "each response behind the last of its prompt"
    assert near.queries.tolist() == [0, 3, 4, 6, 7, 10] and near.keys.tolist() == [0, 3, 4, 7, 9, 13]


def test_what_a_response_sees_by_hand():
    packed = pack(PROMPTS[:1], [0], TOKENS[:1], LENGTHS[:1])
    assert packed.visible(None).int().tolist() == [[[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]]
    assert packed.visible(2).int().tolist() == [[[[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]]]
    padded = pack(PROMPTS, [0, 1], TOKENS[[1, 2]], LENGTHS[[1, 2]])
    assert padded.visible(1)[0, 0].int().tolist() == 3 * [[0, 0, 0, 1]], "padding sees what the last token sees"


def test_responses_that_begin_alike_by_hand():
    """Three of one prompt, the middle one a beginning of the first; behind another prompt they are other tokens."""
    tokens = torch.tensor([[30, 31, 32], [30, 31, 0], [30, 40, 32], [30, 31, 0]])
    packed = pack(PROMPTS, [0, 0, 0, 1], tokens, torch.tensor([3, 2, 3, 2]))
    assert packed.ids.tolist() == [[10, 11, 12, 20, 30, 31, 32, 40, 32, 30, 31]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 3, 4, 5, 4, 5, 1, 2]]
    assert packed.targets.tolist() == [30, 31, 32, 40, 32, 30, 31]
    assert packed.scored_by.tolist() == [2, 4, 5, 4, 7, 3, 9]
    assert packed.response_index.tolist() == [[4, 5, 6], [4, 7, 8], [9, 10, 10]], "no row for what another begins with"
    assert packed.sequence_index[:, :3].tolist() == [[0, 1, 2]] * 2 + [[3, 9, 10]]
    assert packed.response_positions.tolist() == [[3, 4, 5], [3, 4, 5], [1, 2, 2]]
    assert packed.padded_index.tolist() == [0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13]
    assert packed.token_of_response.tolist() == [0, 1, 2, 0, 1, 0, 3, 4, 5, 6]
    assert packed.merged_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 4, 7, 8, 9, 10]
    assert packed.unmerged_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 11, 12, 13]
    assert packed.prompts_and_responses.queries.tolist() == [0, 3, 4, 7, 9, 12, 14], "segments know nothing of it"


@settings(deadline=None)
@given(st.data())
def test_packed_rows_are_the_rollouts(data):
    """Whatever the lengths, whichever rows of whichever groups are in the pack, and whatever they have in common."""
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    n = data.draw(st.integers(1, 3))
    lengths = torch.tensor(data.draw(st.lists(st.lists(st.integers(1, 4), min_size=n, max_size=n),
                                              min_size=len(sizes), max_size=len(sizes))))  # fmt: skip
    prompts = [Prompt(g, tuple(range(100 * g, 100 * g + size)), "", "", "") for g, size in enumerate(sizes)]
    width = int(lengths.max())
    tokens = 1000 + torch.arange(len(sizes) * n * width).view(len(sizes), n, width)
    if data.draw(st.booleans()):
        tokens = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=tokens.numel(), max_size=tokens.numel())))
        tokens = tokens.view(len(sizes), n, width)
    zeros = torch.zeros(tokens.shape)
    rollout = Rollout(prompts, tokens, lengths, zeros, zeros, lengths > 0, [[""] * n] * len(sizes))
    every = [(g, i) for g in range(len(sizes)) for i in range(n)]
    rows = [row for row in every if data.draw(st.booleans())] or every
    packed = pack_rows(rollout, rows)

    ids, positions = packed.ids[0], packed.positions[0]
    beginnings = [(g, *tokens[g, i, :k].tolist()) for g, i in rows for k in range(1, int(lengths[g, i]) + 1)]
    assert len(ids) == sum(sizes[g] for g in {g for g, _ in rows}) + len(set(beginnings)), "each token once"
    which = packed.token_of_response
    assert (which is None) == (len(beginnings) == len(packed.targets))
    which = torch.arange(len(packed.targets)) if which is None else which
    scored = iter(zip(packed.scored_by[which].tolist(), packed.targets[which].tolist(), strict=True))
    before = sum(sizes[g] for g in {g for g, _ in rows})
    merged = torch.arange(before + len(beginnings)) if packed.merged_index is None else packed.merged_index
    for r, (g, i) in enumerate(rows):
        response = tokens[g, i, : lengths[g, i]].tolist()
        sequence = [*prompts[g].ids, *response]
        mine = merged[packed.unmerged_sequence_index[r, : len(sequence)]]
        assert ids[mine].tolist() == sequence and positions[mine].tolist() == list(range(len(sequence)))
        for k, token in enumerate(response):
            index, target = next(scored)
            assert target == token and index == mine[sizes[g] + k - 1]
    for own, sequence in zip(packed.response_index, packed.sequence_index, strict=True):
        assert sequence[positions[own]].equal(own), "the index is the position"
    padded = torch.cat([ids[packed.prompt_index].flatten(), ids[packed.response_index].flatten()])
    assert padded[packed.padded_index].equal(ids)

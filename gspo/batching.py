"""Cutting a rollout into micro-batches that fit a token budget."""

from gspo.types import Rollout

Row = tuple[int, int]  # (group, response)


def packed_tokens(rollout: Rollout, rows: list[Row], lengths: list[list[int]]) -> int:
    """Tokens of one forward over these rows: every response, and the prompt of every group once."""
    prompts = sum(len(rollout.prompts[g].ids) for g in {g for g, _ in rows})
    return prompts + sum(lengths[g][i] for g, i in rows)


def micro_batches(
    rollout: Rollout, groups: list[int], *, budget: int, max_rows: int | None, whole_groups: bool
) -> list[list[Row]] | None:
    """Rows of `groups`, cut in order so that each part holds at most `budget` packed tokens and `max_rows` rows.

    A row alone may exceed the budget (it cannot be cut). With `whole_groups` a part holds whole groups only, and the
    answer is None when some group does not fit.
    """
    n = rollout.tokens.shape[1]
    lengths = rollout.lengths.tolist()
    units = (
        [[(g, i) for i in range(n)] for g in groups] if whole_groups else [[(g, i)] for g in groups for i in range(n)]
    )
    parts: list[list[Row]] = []
    tokens = 0  # of the last part
    for unit in units:
        group, alone = unit[0][0], packed_tokens(rollout, unit, lengths)
        if whole_groups and (alone > budget or len(unit) > (max_rows or n)):
            return None
        shared = len(rollout.prompts[group].ids) if parts and parts[-1][-1][0] == group else 0
        more = alone - shared
        if parts and tokens + more <= budget and (max_rows is None or len(parts[-1]) + len(unit) <= max_rows):
            parts[-1] += unit
            tokens += more
        else:
            parts.append(unit)
            tokens = alone
    return parts

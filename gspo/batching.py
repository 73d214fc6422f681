"""Cutting a rollout into micro-batches that fit a token budget."""

from torch import Tensor

from gspo.types import Prompt, Rollout

Row = tuple[int, int]  # (group, response)


def padded_tokens(rollout: Rollout, rows: list[Row], lengths: list[list[int]]) -> int:
    """Tokens of one forward over these rows, padding included."""
    prompt = max(len(rollout.prompts[g].ids) for g, _ in rows)
    return len(rows) * (prompt + max(lengths[g][i] for g, i in rows))


def micro_batches(
    rollout: Rollout, groups: list[int], *, budget: int, max_rows: int | None, whole_groups: bool
) -> list[list[Row]] | None:
    """Rows of `groups`, cut in order so that each part holds at most `budget` padded tokens and `max_rows` rows.

    A row alone may exceed the budget (it cannot be cut). With `whole_groups` a part holds whole groups only, and the
    answer is None when some group does not fit.
    """
    n = rollout.tokens.shape[1]
    lengths = rollout.lengths.tolist()
    units = (
        [[(g, i) for i in range(n)] for g in groups] if whole_groups else [[(g, i)] for g in groups for i in range(n)]
    )

    def fits(rows: list[Row]) -> bool:
        return padded_tokens(rollout, rows, lengths) <= budget and (max_rows is None or len(rows) <= max_rows)

    parts: list[list[Row]] = []
    for unit in units:
        if whole_groups and not fits(unit):
            return None
        if parts and fits(parts[-1] + unit):
            parts[-1] = parts[-1] + unit
        else:
            parts.append(unit)
    return parts


def take_rows(rollout: Rollout, rows: list[Row]) -> tuple[list[Prompt], Tensor, Tensor]:
    """The rows' prompts, tokens [R, L'] cut to their longest, and lengths [R]."""
    g, i = zip(*rows, strict=True)
    lengths = rollout.lengths[list(g), list(i)]
    tokens = rollout.tokens[list(g), list(i), : int(lengths.max())]
    return [rollout.prompts[k] for k in g], tokens, lengths

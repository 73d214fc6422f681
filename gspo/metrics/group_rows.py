"""Write down groups of responses: what samples.jsonl and the answers of an evaluation keep of each."""

import math
from typing import Any

from gspo.algorithm.pairs import chosen_rejected
from gspo.metrics.trackers import Samples
from gspo.types import Experience, Rollout, Scores

DIGITS = 6  # after the point, of rewards and their parts


def group_row(rollout: Rollout, scores: Scores, g: int, tokenizer: Any) -> dict[str, Any]:
    """Return what is kept of group g: its prompt, as asked and as the model was given it, and its sampled responses.

    Lists have an entry for each of these; lengths are in tokens, a part of the reward is None where it was not given.
    """
    prompt, sampled = rollout.prompts[g], rollout.sampled[g].tolist()

    def kept(values: list[Any]) -> list[Any]:
        return [value for value, one in zip(values, sampled, strict=True) if one]

    parts = {name: [_rounded(x) for x in values[g].tolist()] for name, values in scores.parts.items()}
    return {
        "prompt": prompt.text,
        "model_input": tokenizer.decode(list(prompt.ids), clean_up_tokenization_spaces=False),
        "data_source": prompt.data_source,
        "ground_truth": prompt.ground_truth,
        "responses": kept(rollout.texts[g]),
        "rewards": [round(reward, DIGITS) for reward in scores.rewards[g].tolist()],
        "lengths": kept(rollout.lengths[g].tolist()),
        "finish_reasons": kept(rollout.finish_reasons[g]),
        "reward_parts": {name: values for name, values in parts.items() if any(x is not None for x in values)},
    }


def _rounded(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None


def sample_rows(exp: Experience, scores: Scores, count: int, tokenizer: Any) -> Samples:
    """Return {place: `group_row` and the widest pair} of this rank's groups among the first `count`."""
    rows = {}
    for g, place in enumerate(exp.places):
        if place >= count:
            continue
        row, sampled = group_row(exp.rollout, scores, g, tokenizer), exp.rollout.sampled[g]
        pairs = chosen_rejected(exp.groups.beats[g][sampled][:, sampled], exp.groups.rewards[g][sampled])
        row["chosen"], row["rejected"] = (row["responses"][i] for i in pairs[0][:2]) if pairs else (None, None)
        rows[place] = row
    return rows

"""Sample and score held-out prompts, and report accuracy with 95 % intervals."""

import math
from collections import Counter
from dataclasses import dataclass, field
from math import comb, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.metrics.group_rows import group_row
from gspo.reward.reward_func import extract_answer
from gspo.reward.scorer import Scorer
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import EVAL, GREEDY, Sampler
from gspo.system.cells import columns
from gspo.system.language import word
from gspo.types import Prompt, Rollout, Scores

TOLERANCE = 1e-6  # of float32 rewards, relative
ROWS_AT_ONCE = 256  # that are sent between ranks together
Judged = tuple[Rollout, Scores, Tensor, list[list[str]]]  # responses, scores, `correct_of`, `finals_of`


@dataclass(frozen=True)
class Answers:
    """What was sampled for P prompts: n responses each, and a greedy one."""

    sources: list[str]  # P
    rewards: np.ndarray  # [P, n]
    correct: np.ndarray | None  # [P, n] bool; None where rewards compare within a group only
    greedy: np.ndarray | None  # [P] bool, of the greedy response
    final: list[list[str]]  # P x n, the final answers, for the majority vote
    faults: int = 0  # calls of the reward function that failed
    cut_off: float = 0.0  # share of the n responses that were cut off at the limit of their length
    rows: list[dict[str, Any]] = field(default_factory=list)  # P, what is kept of each prompt (`answer_row`)


def answer(
    sampler: Sampler, scorer: Scorer, prompts: list[Prompt], n: int, sampling: Sampling, world: World
) -> Answers:
    """Sample n responses and a greedy one to every prompt, shared out over the ranks; every rank gets all.

    UserError where the reward function failed on every response.
    """
    scorer = scorer.of_each
    places, sampled = sampler.generate_share(prompts, n, sampling, world, purpose=EVAL, on_group=scorer.begin)
    scores = scorer(sampled)
    _, best = sampler.generate_share(prompts, 1, sampling.greedy(), world, purpose=GREEDY, on_group=scorer.begin)
    greedy = scorer(best)
    right, best_right = (correct_of(each, scorer.correct_at, scorer.ranks) for each in (scores, greedy))
    finals, best_finals = finals_of(scores, sampled), finals_of(greedy, best)
    mine = zip(
        places,
        scores.rewards.tolist(),
        right.tolist(),
        best_right.flatten().tolist(),
        finals,
        strict=True,
    )
    rows = [
        answer_row((sampled, scores, right, finals), (best, greedy, best_right, best_finals), g, sampler.tokenizer)
        for g in range(len(places))
    ]
    calls, faults = (sum(world.gather(getattr(scores, k) + getattr(greedy, k))) for k in ("calls", "faults"))
    if faults == calls:
        raise UserError(f"the reward function {scorer.path} failed on every answer; there is nothing to report.")
    ended = [bool(x) for part in world.gather(sampled.finished.flatten().tolist()) for x in part]
    found = sorted((row for part in world.gather(list(mine)) for row in part), key=lambda row: row[0])
    _, rewards, correct, best_correct, finals = zip(*found, strict=True)
    known = not np.isnan(np.array(correct)).any() and not np.isnan(np.array(best_correct)).any()
    return Answers(
        [p.data_source for p in prompts],
        np.array(rewards),
        np.array(correct) > 0.5 if known else None,
        np.array(best_correct) > 0.5 if known else None,
        list(finals),
        faults=faults,
        cut_off=1 - sum(ended) / max(1, len(ended)),
        rows=_gather_rows(places, rows, len(prompts), world),
    )


def answer_row(sampled: Judged, greedy: Judged, g: int, tokenizer: Any) -> dict[str, Any]:
    """Return what is kept of the answers to a prompt: `group_row` with final answers and what is right, and the greedy
    answer in the same form."""

    def row(rollout: Rollout, scores: Scores, right: Tensor, finals: list[list[str]]) -> dict[str, Any]:
        known = [None if math.isnan(x) else x > 0.5 for x in right[g].tolist()]
        return {**group_row(rollout, scores, g, tokenizer), "predictions": finals[g], "correct": known}

    shared = ("prompt", "model_input", "data_source", "ground_truth")
    return {**row(*sampled), "greedy": {name: x for name, x in row(*greedy).items() if name not in shared}}


def _gather_rows(places: list[int], rows: list[dict[str, Any]], count: int, world: World) -> list[dict[str, Any]]:
    """Return every rank's rows on rank 0, by place, and none on the others; some places at a time, as texts are long.
    Every rank must call this."""
    found: list[dict[str, Any]] = []
    mine = dict(zip(places, rows, strict=True))
    for first in range(0, count, ROWS_AT_ONCE):
        part = {place: row for place, row in mine.items() if first <= place < first + ROWS_AT_ONCE}
        parts = world.gather(part)
        if world.is_main:
            found += [row for _, row in sorted(item for each in parts for item in each.items())]
    return found


def correct_of(scores: Scores, correct_at: float = 1.0, ranks: bool = False) -> Tensor:
    """Return which responses are correct, [G, n] of 0, 1 and, where that is not known, NaN.

    As the reward function says (`acc`); else those of at least the reward `correct_at`. Where `ranks`, rewards compare
    within a group: its best response is not right by that.
    """
    right = (scores.rewards >= correct_at - TOLERANCE * abs(correct_at)).double()
    if ranks:
        right.fill_(torch.nan)
    if scores.faulty is not None:
        right[scores.faulty] = 0.0
    acc = scores.parts.get("acc")
    return right if acc is None else torch.where(acc.isnan(), right, (acc > 0.5).double())


def finals_of(scores: Scores, sampled: Rollout) -> list[list[str]]:
    """Return G x n final answers: those the reward function read (`pred`), or else `extract_answer`'s."""
    return [
        [extract_answer(text) if pred is None else pred for text, pred in zip(*group, strict=True)]
        for group in zip(sampled.texts, scores.predictions, strict=True)
    ]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Estimate pass@k without bias from n samples, 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, eq. 1)."""
    assert k <= n
    return 1.0 - comb(n - correct, k) / comb(n, k)


def majority_reward(rewards: np.ndarray, final: list[str]) -> float:
    """Return the mean reward of the most frequent final answer; where several are, the mean over them."""
    counts = Counter(final)
    most = max(counts.values())
    winners = [a for a, c in counts.items() if c == most]
    return float(np.mean([np.mean([r for r, f in zip(rewards, final, strict=True) if f == a]) for a in winners]))


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of n independent yes / no outcomes (Wilson 1927)."""
    z, p = 1.959964, successes / n
    centre, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def bootstrap(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean over prompts; seeded, so the same every time."""
    index = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[index].mean(1), [2.5, 97.5])
    return float(low), float(high)


def summarise(answers: Answers) -> dict[str, Any]:
    """Return {metric: value, ..., "interval": {metric: [low, high]}} over these prompts."""
    correct, greedy = answers.correct, answers.greedy
    n = answers.rewards.shape[1]
    result: dict[str, Any] = {"prompts": len(answers.sources), "samples": n}
    per_prompt, interval = {}, {}
    if correct is not None:
        result["greedy"], interval["greedy"] = float(greedy.mean()), list(wilson(greedy.sum(), len(greedy)))
        for k in (1, 2, 4, 8, 16, 32):
            if k <= n:
                per_prompt[f"pass@{k}"] = np.array([pass_at_k(n, int(c), k) for c in correct.sum(1)])
        votes = zip(correct, answers.final, strict=True)
        per_prompt[f"maj@{n}"] = np.array([majority_reward(c.astype(float), f) for c, f in votes])
    per_prompt["reward_mean"] = answers.rewards.mean(1)
    for name, values in per_prompt.items():
        result[name] = float(values.mean())
        interval[name] = list(bootstrap(values))
    return result | {"interval": interval}


def report(answers: Answers) -> dict[str, Any]:
    """Return the summary over all prompts, and by data source where there are several."""
    result = summarise(answers)
    if answers.correct is not None:
        result["correct_counts"] = answers.correct.sum(1).tolist()  # for paired comparisons
    result["cut_off"] = answers.cut_off
    if answers.faults:
        result["reward_faults"] = answers.faults
    names = sorted(set(answers.sources))
    if len(names) > 1:
        result["by_data_source"] = {}
        for name in names:
            rows = [i for i, s in enumerate(answers.sources) if s == name]
            part = Answers(
                [name] * len(rows),
                answers.rewards[rows],
                None if answers.correct is None else answers.correct[rows],
                None if answers.greedy is None else answers.greedy[rows],
                [answers.final[i] for i in rows],
            )
            result["by_data_source"][name] = summarise(part)
    return result


def summary_line(result: dict[str, Any]) -> str:
    """Return the first numbers of a report in a line."""
    found = [f"{name} {result[name]:.3f}" for name in ("greedy", "pass@1", "reward_mean") if name in result]
    return ", ".join([*found, f"{result['cut_off']:.0%} cut off"])


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Format reports side by side, {title: report}: a line a metric, each value with its interval."""
    cells = [["", *map(word, reports)]]
    for m in next(iter(reports.values()))["interval"]:
        row = [word(m)]
        for r in reports.values():
            row.append(f"{r[m]:.3f} [{r['interval'][m][0]:.3f}, {r['interval'][m][1]:.3f}]" if m in r else "")
        cells.append(row)
    return columns(cells)

"""Compute the metrics of a step from its experience and its update, and merge them over ranks."""

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gspo import config
from gspo.algorithm.objective import find_algorithm, kl_k3, pair_accuracy, relative_ranking_terms
from gspo.algorithm.pairs import preferences
from gspo.types import Experience, Rollout, Scores, Update

RETURNED = "/returned"  # `reward/<part>/returned`: the share of responses for which the function returned the part

SAMPLING = {"reward_mean", "reward_max", "entropy", "mismatch", "response/cutoff", "tokens", "tokens_prefilled"}


class Meter:
    """Collect means, sums and maxima of one step on a rank, to be merged over ranks."""

    def __init__(self) -> None:
        self.means: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.sums: dict[str, float] = defaultdict(float)
        self.maxima: dict[str, float] = {}

    def mean(self, name: str, total: float, count: float) -> None:
        """Add `count` observations that sum to `total`."""
        self.means[name][0] += total
        self.means[name][1] += count

    def sum(self, name: str, value: float) -> None:
        """Add to a sum over ranks."""
        self.sums[name] += value

    def max(self, name: str, value: float) -> None:
        """Take the maximum over ranks."""
        self.maxima[name] = max(value, self.maxima.get(name, -math.inf))

    def state(self) -> tuple[dict, dict, dict]:
        """Return what `merge` takes."""
        return dict(self.means), dict(self.sums), dict(self.maxima)

    @staticmethod
    def merge(states: list[tuple[dict, dict, dict]]) -> dict[str, float]:
        """Merge all ranks' states -> {metric: value}; a mean over nothing is left out, and so is the share of responses
        with a reward part where all have it."""
        whole = Meter()
        for means, sums, maxima in states:
            for name, (total, count) in means.items():
                whole.mean(name, total, count)
            for name, value in sums.items():
                whole.sum(name, value)
            for name, value in maxima.items():
                whole.max(name, value)
        values = {name: total / count for name, (total, count) in whole.means.items() if count}
        scored = whole.sums.pop("responses", 0.0)
        for name in [name for name in whole.sums if name.endswith(RETURNED)]:
            share = whole.sums.pop(name) / max(scored, 1.0)
            if 0 < share < 1:
                values[name] = share
        if "gap_squares" in values:
            variance = values.pop("gap_squares") - values["pairs/gap_mean"] ** 2
            values["pairs/gap_std"] = math.sqrt(max(0.0, variance))
        return {**values, **whole.sums, **whole.maxima}


class Clock:
    """Measure the seconds of each stage of a step: `with clock("rollout"):`."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[f"time/{stage}"] = time.perf_counter() - began

    def metrics(self, tokens: float | None) -> dict[str, float]:
        """Return the seconds of each stage and of the step so far, and sampled tokens a second; None: none were."""
        step = time.perf_counter() - self.start
        if tokens is None:
            return {**self.seconds, "time/step": step}
        rates = {"tokens_per_second": tokens / step, "tokens_per_second/rollout": tokens / self.seconds["time/rollout"]}
        return {**self.seconds, "time/step": step, **rates}


def peak_memory_gib(device: torch.device) -> float:
    """Return peak memory so far: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def observe(exp: Experience, scores: Scores, update: Update, cfg: config.Objective) -> Meter:
    """Return this rank's part of every metric that follows from one step's data. Gold solutions (`Rollout.sampled`) are
    left out."""
    meter = Meter()
    _observe_rewards(meter, scores)
    _observe_responses(meter, exp.rollout)
    _observe_pairs(meter, exp, update, cfg)
    _observe_update(meter, exp, update)
    return meter


def training_pairs(metrics: dict[str, float]) -> dict[str, float]:
    """Return what stands for the metrics of held-out pairs where there are none: those of the training batch."""
    names = {"preference_accuracy": "pairs/accuracy_train", "ranking_loss": "pairs/ranking_train"}
    return {} if "heldout/pairs" in metrics else {name: metrics[own] for name, own in names.items() if own in metrics}


def without_sampling(metrics: dict[str, float]) -> dict[str, float]:
    """Leave out what says nothing of a policy that did not sample the responses: they are read from the rows."""
    return {name: x for name, x in metrics.items() if name not in SAMPLING and not name.startswith("reward/")}


def _observe_rewards(meter: Meter, scores: Scores) -> None:
    g, n = scores.rewards.shape
    kept = [i for i in range(g) if i not in scores.skipped]
    meter.mean("reward/batch_mean", float(scores.rewards[kept].sum()), len(kept) * n)
    meter.mean("reward/batch_max", float(scores.rewards[kept].amax(1).sum()) if kept else 0.0, len(kept))
    meter.sum("reward/errors", scores.errors)
    meter.sum("reward/timeouts", scores.timeouts)
    meter.mean("reward/faults", scores.faults, scores.calls)
    meter.sum("responses", len(kept) * n)
    for name, values in scores.parts.items():
        known = values[kept][~values[kept].isnan()]
        meter.mean(f"reward/{name}", float(known.sum()), known.numel())
        meter.sum(f"reward/{name}{RETURNED}", known.numel())


def _observe_responses(meter: Meter, rollout: Rollout) -> None:
    sampled = rollout.sampled
    lengths = rollout.lengths[sampled]
    tokens, count = int(lengths.sum()), lengths.numel()
    meter.mean("response/length_mean", tokens, count)
    meter.max("response/length_max", float(lengths.max()) if count else 0.0)
    meter.mean("response/cutoff", float((~rollout.finished[sampled]).sum()), count)
    meter.mean("entropy", float(rollout.entropy.sum()), tokens)
    meter.sum("tokens", tokens - int(rollout.copied.sum()))
    meter.sum("tokens_prefilled", int(rollout.prefilled.sum()))
    branches = rollout.copied > 0
    meter.mean(
        "branches/without_place", float((branches & (rollout.copied == rollout.lengths)).sum()), int(branches.sum())
    )
    meter.mean("branches/copied", float(rollout.copied.sum()), int(branches.sum()))


def _observe_pairs(meter: Meter, exp: Experience, update: Update, cfg: config.Objective) -> None:
    """Pairs of sampled responses; and of the pairs that the algorithm learns from, how far apart the implicit rewards
    are before the update."""
    sampled = exp.rollout.sampled
    beats = exp.groups.beats & _both(sampled)
    algorithm = find_algorithm(cfg.algorithm)
    teaching = beats if algorithm.uses_margin else preferences(exp.groups.rewards, 0.0) & _both(sampled)
    meter.mean("pairs/per_group", float(beats.sum()), len(beats))
    meter.mean("pairs/groups_without", float((~teaching.flatten(1).any(1)).sum()), len(beats))
    if algorithm.uses_margin:
        differing, apart = (preferences(exp.groups.rewards, least)[_both(sampled)] for least in (0.0, cfg.margin))
        meter.mean("pairs/within_margin", float((differing & ~apart).sum()), int(differing.sum()))
    winners = beats.any(-1)
    per_token = update.logprobs.double().sum(-1) / exp.rollout.lengths.clamp_min(1)
    meter.mean("winner_logprob", float(per_token[winners].sum()), int(winners.sum()))

    gap, learned = algorithm.gaps(update.logprobs.double(), exp.groups, cfg), algorithm.pairs(exp.groups)
    of_pairs = gap[learned]
    if cfg.anchor_model != "old":  # there every implicit reward is zero
        meter.mean("pairs/accuracy_train", pair_accuracy(gap, learned), of_pairs.numel())
    meter.mean("gap_squares", float(of_pairs.square().sum()), of_pairs.numel())
    meter.mean("pairs/gap_mean", float(of_pairs.sum()), of_pairs.numel())
    terms = relative_ranking_terms(gap, learned)
    meter.mean("pairs/ranking_train", float(terms.sum()), len(terms))


def _both(sampled: Tensor) -> Tensor:
    """Return of which two responses both were sampled: [G, N] -> [G, N, N] bool."""
    return sampled[:, :, None] & sampled[:, None, :]


def _observe_update(meter: Meter, exp: Experience, update: Update) -> None:
    mask = exp.rollout.sampled_mask
    tokens = int(mask.sum())
    meter.mean("kl_divergence", float(kl_k3(update.logprobs, exp.reference_logprobs)[mask].sum()), tokens)
    meter.mean("mismatch", float((update.logprobs - exp.rollout.logprobs)[mask].abs().sum()), tokens)
    for name, value in update.terms.items():
        meter.sum(f"loss/{name}", value)
    meter.sum("loss/total", sum(update.terms.values()))
    meter.mean("grad_norm", sum(x for x in update.grad_norms if math.isfinite(x)), len(update.grad_norms))
    meter.mean("clip_share", float(update.clipped), update.ratios)
    meter.max("skipped_updates", update.skipped)
    meter.max("empty_updates", update.empty)

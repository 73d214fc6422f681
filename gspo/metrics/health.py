"""Watch for the ways preference learning goes wrong, and say what to do about each.

`GUARDS` is the table of failures; its limits are the section `health` of the configuration. `HealthCheck` reads each
step's metrics and warns once, or ends the run (`health.on_alarm`), with the fix, when one has been out of its range
for some steps in a row. It also derives the curves that compare a step with the run's own past, such as
`response/length_ratio`.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gspo.config import Health
from gspo.system.language import language, translated

INITIAL_STEPS = 3  # the initial value is the mean over this many first steps of the run
RATIOS = {"response/length_ratio": "response/length_mean", "entropy_ratio": "entropy"}  # a metric, now / initially
ROUND_ENDS = "win_rate"  # logged when a round ends; held-out accuracy may come more often, over too few steps
FEW_PAIRS = 20  # held-out pairs, below which their share in the right order says little
ROUND_GRACE = 20  # steps of a round in which the policy may still be close to its opponent
LOWER_LR = "lower optim.learning_rate"
MISMATCH_MAX = {"fp32": 0.02, "bf16": 0.05}  # of health.mismatch_max=auto: what rounding costs differs


@dataclass(frozen=True)
class Guard:
    """One kind of failure. `warn` and `alarm` name limits of `config.Health`; `says` shows the one that was passed, or
    the value."""

    kind: str
    metric: str  # of the step, or derived
    bad: Literal["above", "below"]
    warn: str
    alarm: str | None
    says: str
    cure: str
    at_once: bool = False  # warn at the first step: the metric is slow, rare, or never harmless
    grace: int = 0  # first steps of a round in which it does not count
    unless: tuple[str, ...] = ()  # states of the run (HealthCheck._states) that explain the value away


GUARDS = (
    Guard(
        "literal-form collapse", "pairs/gap_std", "above", "gap_std_max", "gap_std_alarm",
        "pairs/gap_std is above {limit:g} (chosen and rejected responses lie so far apart in log-prob that the loss "
        "hardly learns from most pairs)",
        "use objective.anchor=opponent, lower objective.preference_beta or set objective.length_norm=mean",
    ),
    Guard(
        "likelihood displacement", "winner_logprob_drop", "above", "winner_logprob_drop_max", None,
        "the chosen responses have lost more than {limit:g} nats a token since the round began (the rejected ones "
        "sink, and take them along)",
        f"set objective.nll_coef=0.05, {LOWER_LR} or raise objective.kl_coef",
    ),
    Guard(
        "length explosion", "response/length_ratio", "above", "length_ratio_max", None,
        "responses are more than {limit:g} times as long as at first",
        "set objective.length_norm=mean, or fix a reward function that pays for length",
    ),
    Guard(
        "cut-off responses", "response/cutoff", "above", "cutoff_max", None,
        "more than {limit:.0%} of the responses are cut off",
        "raise rollout.max_new_tokens, or set objective.length_norm=mean if responses grow",
        unless=("mostly cut off",),
    ),
    Guard(
        "mostly cut-off responses", "response/cutoff", "above", "cutoff_at_once", None,
        "{value:.0%} of the responses are cut off",
        "raise rollout.max_new_tokens, or let prompt and reward ask for shorter answers",
        at_once=True,
    ),
    Guard(
        "KL blow-up", "kl_divergence", "above", "kl_divergence_max", "kl_divergence_alarm",
        "kl_divergence is above {limit:g}",
        f"raise objective.kl_coef or {LOWER_LR}",
    ),
    Guard(
        "standstill", "kl_divergence", "below", "kl_divergence_min", None,
        "kl_divergence is below {limit:g} (the policy hardly moves)",
        "raise optim.learning_rate",
        grace=ROUND_GRACE,
    ),
    Guard(
        "pair starvation", "pairs/groups_with", "below", "paired_groups_min", None,
        "fewer than {limit:.0%} of the prompts give a pair",
        "raise rollout.n, lower objective.margin (pairs alone have one), or choose other prompts: harder ones if "
        "reward/batch_mean is near 1, easier ones if it is near 0, unless their gold answers are wrong "
        "(read samples.jsonl)",
        unless=("learned",),
    ),
    Guard(
        "wide margin", "pairs/within_margin", "above", "within_margin_max", None,
        "{value:.0%} of the differing responses differ by no more than objective.margin, and make no pair",
        "lower objective.margin",
        at_once=True,
        unless=("solved", "risen"),
    ),
    Guard(
        "misordered pairs", "preference_accuracy", "below", "preference_accuracy_min", None,
        "preference_accuracy is below {limit:g}",
        f"check the reward function, raise objective.margin to filter noisy pairs, or {LOWER_LR}",
        grace=ROUND_GRACE,
        unless=("scarce", "starved", "risen"),
    ),
    Guard(
        "reward hacking", "heldout/diverging", "above", "diverging_rounds_max", None,
        "training reward rises and held-out accuracy falls, round after round (the policy learns what is paid, not "
        "what is right)",
        "read samples.jsonl, fix the reward function, raise objective.kl_coef, or stop at an earlier checkpoint",
        at_once=True,
    ),
    Guard(
        "sampler / trainer mismatch", "mismatch", "above", "mismatch_max", "mismatch_alarm",
        "sampler and trainer disagree by more than {limit:g} nats a token",
        "use model.precision=fp32; where it is fp32, sampler and trainer do not compute the same model",
    ),
    Guard(
        "entropy collapse", "entropy_ratio", "below", "entropy_ratio_min", None,
        "entropy is below {limit:g} of what it was at first, and the task is not solved (the responses to a prompt are "
        "all alike)",
        f"{LOWER_LR}, raise objective.kl_coef or rollout.temperature",
        unless=("solved",),
    ),
    Guard(
        "non-finite update", "skipped_updates", "above", "skipped_updates_max", None,
        "the loss or its gradient was not finite, and the update was skipped",
        f"{LOWER_LR}, or use model.precision=fp32",
        at_once=True,
    ),
    Guard(
        "failing reward function", "reward/faults", "above", "reward_faults_max", None,
        "more than {limit:.0%} of the reward function's calls fail",
        "fix it, or raise reward.timeout_s",
    ),
)  # fmt: skip


MOSTLY_CUT_OFF = next(guard for guard in GUARDS if guard.kind == "mostly cut-off responses")


def advice(said: str, cure: str) -> str:
    """Return what has happened and what to do about it, in the user's language."""
    between = ": " if language() == "en" else "："
    return f"{translated(said)}{between}{translated(cure)}"


def limit_of(name: str, cfg: Health, precision: str = "fp32") -> float:
    """Return a limit of the configuration; one that is `auto` by the precision, fp32 or bf16."""
    limit = getattr(cfg, name)
    return MISMATCH_MAX[precision] if limit == "auto" else limit


def healthy_range(metric: str, cfg: Health) -> tuple[float | None, float | None]:
    """Return the lowest and the highest value of a metric that no guard warns of; None where there is no such limit."""
    limits = [(guard.bad, limit_of(guard.warn, cfg)) for guard in GUARDS if guard.metric == metric]
    lows, highs = ([limit for bad, limit in limits if bad == side] for side in ("below", "above"))
    return max(lows, default=None), min(highs, default=None)


class News(NamedTuple):
    """A warning or an alarm to print."""

    level: Literal["warning", "alarm"]
    text: str


class HealthCheck:
    """Check every guard, step after step. `alarmed` is why the run is to stop, with health.on_alarm=stop.

    Its state follows from the metrics it has seen: given those of the steps before a checkpoint, it goes on as if the
    run had not been interrupted, `alarmed` included.
    """

    def __init__(self, cfg: Health, precision: str = "fp32", full_reward: float = 1.0):
        """full_reward: of a right response."""
        self.cfg, self.precision, self.full_reward = cfg, precision, full_reward
        self.derived: dict[str, float] = {}  # of the last step
        self.alarmed: str | None = None
        self.streak: dict[tuple[str, str], int] = defaultdict(int)
        self.warned: set[tuple[str, str]] = set()
        self.round, self.round_age = None, 0
        self.initial: dict[str, list[float]] = defaultdict(list)
        self.winners_at_first: float | None = None  # in this round
        self.rewards: list[float] = []  # of the steps since a round ended
        self.ended: tuple[float, float] | None = None  # the round before: mean of these, held-out accuracy
        self.diverging = 0
        self.accuracy = 0.0  # held-out, measured last

    def check(self, metrics: dict[str, float], causes: dict[str, str] | None = None) -> list[News]:
        """Return the warnings and alarms that are new at this step; each comes once a run. `causes` says in a few words
        what is behind a metric's value."""
        if metrics.get("round", 0.0) != self.round:
            self.round, self.round_age, self.winners_at_first = metrics.get("round", 0.0), 0, None
        self.round_age += 1
        self.derived = self._derive(metrics)
        values = metrics | self.derived
        states, news = self._states(values), []
        for guard in GUARDS:
            value = values.get(guard.metric)
            if self.round_age <= guard.grace or states.intersection(guard.unless):
                value = None
            for level, name, patience in (
                ("alarm", guard.alarm, self.cfg.alarm_patience),
                ("warning", guard.warn, 1 if guard.at_once else self.cfg.patience),
            ):
                if not name:
                    continue
                limit = limit_of(name, self.cfg, self.precision)
                if self._passed(guard, level, value, limit, patience):
                    said = guard.says.format(limit=limit, value=value)
                    if cause := (causes or {}).get(guard.metric):
                        said += f" (not finite first: {cause})"
                    if level == "alarm":
                        said += f", now {value:.3g}; what is learned from here on is likely lost"
                    news.append(News(level, advice(said, guard.cure)))
        alarms = [text for level, text in news if level == "alarm"]
        if self.cfg.on_alarm == "stop" and alarms and self.alarmed is None:
            self.alarmed = f"{alarms[0]}. health.on_alarm=warn goes on regardless."
        return news

    def _passed(self, guard: Guard, level: str, value: float | None, limit: float, patience: int) -> bool:
        """Whether the guard's limit has now been passed for `patience` steps in a row, and this is news."""
        bad = value is not None and (value > limit if guard.bad == "above" else value < limit)
        key = (guard.kind, level)
        self.streak[key] = self.streak[key] + 1 if bad else 0
        if self.streak[key] != patience or key in self.warned:
            return False
        self.warned |= {key, (guard.kind, "warning")}  # after an alarm its warning is no news
        return True

    def _states(self, values: dict[str, float]) -> set[str]:
        """Return the states of the run that make an unusual value harmless (`Guard.unless`)."""
        found = set()
        self.accuracy = values.get("heldout/accuracy", self.accuracy)
        # Low entropy is expected of a policy that knows the answers. Held-out prompts tell, too: rewards in training
        # stay lower where some gold answers are wrong.
        if max(values.get("reward_mean", 0.0) / self.full_reward, self.accuracy) >= self.cfg.solved_reward:
            found.add("solved")
        if values.get("response/cutoff", 0.0) > self.cfg.cutoff_at_once:
            found.add("mostly cut off")  # a guard of its own says so
        rewards = self.initial["reward_mean"]
        first = sum(rewards) / len(rewards) if rewards else math.nan
        risen = values.get("reward_mean", 0.0) - first > self.cfg.risen_reward
        if "solved" in found and first / self.full_reward < self.cfg.solved_reward:
            found.add("learned")  # few pairs are what success looks like; prompts that were never hard are another case
        if "heldout/pairs" in values:  # the same pairs for a whole round: nothing explains their accuracy away
            return found | ({"scarce"} if values["heldout/pairs"] < FEW_PAIRS else set())
        if risen:
            found.add("risen")  # the pairs left are what a much better policy still gets wrong
        if values.get("pairs/groups_with", 1.0) < self.cfg.paired_groups_min:
            found.add("starved")  # the last few pairs are what the policy still gets wrong
        return found

    def _derive(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the curves that follow from this step's metrics and those before."""
        found = {}
        for name, metric in RATIOS.items():
            if metric not in metrics:
                continue
            first = self.initial[metric]
            if len(first) < INITIAL_STEPS:
                first.append(metrics[metric])
            if sum(first) > 0:
                found[name] = metrics[metric] * len(first) / sum(first)
        if "pairs/groups_without" in metrics:
            found["pairs/groups_with"] = round(1 - metrics["pairs/groups_without"], 9)  # 1 - 0.8 is not 0.2
        if "winner_logprob" in metrics:
            if self.winners_at_first is None:
                self.winners_at_first = metrics["winner_logprob"]
            found["winner_logprob_drop"] = self.winners_at_first - metrics["winner_logprob"]
        if "reward_mean" in metrics:
            self.rewards.append(metrics["reward_mean"])
            if len(self.initial["reward_mean"]) < INITIAL_STEPS:
                self.initial["reward_mean"].append(metrics["reward_mean"])
        if {"heldout/accuracy", ROUND_ENDS} <= metrics.keys() and self.rewards:
            now = (sum(self.rewards) / len(self.rewards), metrics["heldout/accuracy"])
            worse = self.ended is not None and now[0] > self.ended[0] and now[1] < self.ended[1]
            self.diverging = self.diverging + 1 if worse else 0
            self.ended, self.rewards = now, []
            found["heldout/diverging"] = float(self.diverging)
        return found

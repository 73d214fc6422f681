"""Define the bounds beyond which a run warns: the section `health` of the configuration."""

from dataclasses import dataclass
from typing import Literal

from gspo.config_option import opt


@dataclass
class Health:
    """Limits on the metrics: beyond them a run warns, raises an alarm, or stops."""

    gap_std_max: float = opt(
        0.7, "warn above: standard deviation of the implicit reward gaps; the sigmoid saturates", gt=0.0
    )
    gap_std_alarm: float = opt(1.5, "alarm above: the same", gt=0.0)
    winner_logprob_drop_max: float = opt(
        0.2, "warn above: log-prob that the chosen responses have lost since the round began, nats per token", gt=0.0
    )
    length_ratio_max: float = opt(1.5, "warn above: mean response length / that of the first steps", gt=0.0)
    cutoff_max: float = opt(0.1, "warn above: share of responses cut off at max_new_tokens", gt=0.0)
    cutoff_at_once: float = opt(
        0.5, "warn above, at the first step and in the evaluation before it: share of responses cut off", gt=0.0
    )
    kl_divergence_min: float = opt(0.001, "warn below: kl_divergence", ge=0.0)
    kl_divergence_max: float = opt(0.1, "warn above: kl_divergence", gt=0.0)
    kl_divergence_alarm: float = opt(0.5, "alarm above: kl_divergence", gt=0.0)
    paired_groups_min: float = opt(0.2, "warn below: share of groups with a pair", ge=0.0, le=1.0)
    within_margin_max: float = opt(
        0.5, "warn above, at the first step: share of two differing rewards that objective.margin makes no pair", gt=0.0
    )
    preference_accuracy_min: float = opt(0.6, "warn below: preference_accuracy", ge=0.0, le=1.0)
    diverging_rounds_max: int = opt(
        1, "warn above: rounds in a row in which training reward rose and held-out accuracy fell", ge=0
    )
    mismatch_max: float | Literal["auto"] = opt(
        "auto", "warn above: mean |sampler - trainer| log-prob of a token. auto: 0.02 in fp32, 0.05 in bf16", gt=0.0
    )
    mismatch_alarm: float = opt(0.1, "alarm above: the same", gt=0.0)
    entropy_ratio_min: float = opt(0.3, "warn below: entropy / that of the first steps", ge=0.0)
    risen_reward: float = opt(
        0.2, "without held-out pairs: reward gain above which the preference_accuracy warning is off", ge=0.0
    )
    solved_reward: float = opt(
        0.9, "mean reward, as a share of a right response's, above which the entropy warning is off", ge=0.0
    )
    skipped_updates_max: int = opt(0, "warn above: updates of a step skipped because they were not finite", ge=0)
    reward_faults_max: float = opt(0.05, "warn above: share of reward calls that failed", ge=0.0, le=1.0)
    patience: int = opt(5, "steps in a row beyond a limit before the warning", ge=1)
    alarm_patience: int = opt(2, "steps in a row beyond an alarm's limit before the alarm", ge=1)
    on_alarm: Literal["warn", "stop"] = opt("warn", "stop: an alarm ends the run, with a checkpoint")
    max_bad_steps: int = opt(5, "non-finite updates in a row before the run stops", ge=1)

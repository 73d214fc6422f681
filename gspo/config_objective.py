"""The section `objective` of the configuration."""

from dataclasses import dataclass
from typing import Literal

from gspo.config_option import opt


@dataclass
class Objective:
    """The loss: what the policy learns from scored responses."""

    algorithm: str = opt(
        "gspo",
        "objective: gspo, a baseline (rloo, grpo, dr_grpo, maxrl, tempo, online_dpo, spin), ppo, dpo (offline), or "
        "your own line of ALGORITHMS in gspo/algorithm/objective.py",
    )
    form: Literal["default", "seed"] = opt(
        "default",
        "seed: the algorithm of the original description (docs/seed.md): algorithm gspo, anchor none, after_fork 1, "
        "length_norm sum, pair_weight one, normalizer batch, nll_coef 0, data.shuffle true, data.spaced false, and to "
        "set one of these otherwise is an error; default: every setting as it stands",
    )
    preference_beta: float = opt(0.1, "temperature of the preference loss", gt=0.0)
    margin: float = opt(0.1, "two responses form a pair when their rewards differ by more than this", ge=0.0)
    anchor: Literal["auto", "none", "opponent", "initial", "old"] = opt(
        "auto",
        "model whose log-probs are subtracted from the policy's; none: the original formula, nothing subtracted; auto: "
        "none for gspo, initial for dpo, else opponent",
    )
    after_fork: float = opt(
        1.0,
        "weight of the tokens after the fork, the first token at which two responses differ; 1: whole responses as in "
        "DPO",
        ge=0.0,
        le=1.0,
    )
    length_norm: Literal["sum", "mean"] = opt("sum", "log-prob of a response: the sum over its tokens, or their mean")
    pair_weight: Literal["one", "gap", "branch"] = opt(
        "one",
        "weight of a pair: 1; its reward gap; or branch: the mean reward of the responses that go the winner's way at "
        "the fork, less that of those that go the loser's, or 0",
    )
    normalizer: Literal["constant", "batch", "group", "sqrt"] = opt(
        "batch", "what the pair losses of a group are divided by"
    )
    dpo_loss: Literal["sigmoid", "ipo", "simpo"] = opt(
        "sigmoid", "dpo: its loss: the paper's, IPO's square, or SimPO's of mean log-probs, without an anchor"
    )
    label_smoothing: float = opt(0.0, "dpo, not ipo: share of pairs taken to be labelled wrongly", ge=0.0, lt=0.5)
    simpo_gamma: float = opt(0.5, "dpo, simpo: the implicit reward by which chosen should lead", ge=0.0)
    use_ranking_loss: bool = opt(True, "add the ranking (Plackett-Luce) term")
    ranking_coef: float = opt(0.1, "weight of the ranking term", ge=0.0)
    kl_coef: float = opt(1e-3, "weight of the KL term to the reference", ge=0.0)
    kl_in: Literal["loss", "reward"] = opt("loss", "where the KL counts; reward: in each token's reward (ppo)")
    nll_coef: float = opt(0.0, "weight of the winners' negative log-likelihood", ge=0.0)
    clip_low: float = opt(0.2, "off-policy updates: clip the ratio below 1 - this", gt=0.0, lt=1.0)
    clip_high: float = opt(0.28, "off-policy updates: clip the ratio above 1 + this", gt=0.0)
    max_mismatch_weight: float = opt(2.0, "off-policy updates: upper bound on p_train / p_sampler", ge=1.0)

    @property
    def anchor_model(self) -> str:
        """The anchor that is meant: `auto` is resolved by the algorithm."""
        if self.anchor != "auto":
            return self.anchor
        return {"gspo": "none", "dpo": "initial"}.get(self.algorithm, "opponent")

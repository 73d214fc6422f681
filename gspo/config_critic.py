"""Declare the parameters of PPO's critic: the section `critic` of the configuration."""

from dataclasses import dataclass

from gspo.config_option import opt


@dataclass
class Critic:
    """The value function of objective.algorithm=ppo, and the advantages made of it."""

    shared: bool = opt(
        False,
        "true: only a linear head is trained, on the policy's hidden states, which it leaves alone; false: the critic "
        "has a body of its own, opened from model.path",
    )
    learning_rate: float = opt(1e-5, "step size of the critic's AdamW", gt=0.0)
    warmup_steps: int = opt(0, "steps of linear warm-up of that step size", ge=0)
    clip: float = opt(0.2, "how far a value may move from its value before the update and still gain by it", gt=0.0)
    gamma: float = opt(1.0, "discount of later rewards", gt=0.0, le=1.0)
    gae_lambda: float = opt(
        0.95, "GAE: 1: the rewards that followed, less the value; 0: one token's change of value", ge=0.0, le=1.0
    )
    normalize_advantages: bool = opt(True, "give the advantages of a batch's tokens mean 0 and standard deviation 1")

"""Understand settings as users of verl and TRL write them, or answer what to do here instead.

`translate` is asked before a name is looked up. Names that stand for one parameter with the same values are ALIASES
(config_aliases.py), those that need no setting are in foreign_not_needed.py. Here are those whose value means something
else, and those that have no counterpart; a switch of the last kind that is off is passed over.
"""

from collections.abc import Callable
from typing import Any

from gspo.config import Config
from gspo.errors import UserError
from gspo.foreign_not_needed import ACTOR, MODEL, ROLLOUT, why_not_needed
from gspo.read_yaml import plain

Settings = dict[str, Any]
OFF = (None, False, 0, -1, "none", "None", "")

OBJECTIVES = {
    "grpo": "grpo",
    "rloo": "rloo",
    "rloo_vectorized": "rloo",
    "gae": "ppo",
}  # verl's advantage estimator -> ours
SCHEDULES = {"constant_with_warmup": "constant"}  # optim.warmup_steps warms up any schedule


def _objective(value: Any) -> Settings:
    if value not in OBJECTIVES:
        raise UserError(
            f"algorithm.adv_estimator = {value!r} has no counterpart; objective.algorithm names an objective "
            "(docs/algorithm.md), and is gspo if left out."
        )
    return {"objective.algorithm": OBJECTIVES[value]}


def _schedule(value: Any) -> Settings:
    return {"optim.schedule": SCHEDULES.get(value, value)}


def _loss_type(value: Any) -> Settings:
    """TRL's loss_type: GRPO's two that are here, by the same names."""
    if value not in ("grpo", "dr_grpo", *OFF):
        raise UserError(f"loss_type = {value!r} is not understood. {LOSS_TYPE}")
    return {} if value in OFF else {"objective.algorithm": value}


def _betas(value: Any) -> Settings:
    if not isinstance(value, list) or len(value) != 2:
        raise UserError(f"{ACTOR}optim.betas = {value!r} must be two numbers, [0.9, 0.99].")
    return {"optim.beta1": value[0], "optim.beta2": value[1]}


def _if_on(key: str, value: Any) -> Callable[[Any], Settings]:
    """Return the meaning of a switch: one setting where it is on, none where it is off."""
    return lambda given: {key: value} if given not in OFF else {}


def _only(name: str, *values: Any, otherwise: str) -> Callable[[Any], Settings]:
    """Return the meaning of a setting that can have these values only, and then needs nothing."""

    def meaning(given: Any) -> Settings:
        if given not in values and given not in OFF:
            raise UserError(f"{name} = {given!r} is not understood. {otherwise}")
        return {}

    return meaning


def _path_to_resume(value: Any) -> Settings:
    return {} if value in OFF else {"trainer.resume": value}


def _trackers(value: Any) -> Settings:
    return {"trainer.trackers": [] if value in OFF or value == ["none"] else value}


ONE_COPY = (
    "A sequence is not split over ranks; model.shard_size shards the weights, optim.micro_batch_tokens bounds a pass."
)
SOURCE_NAME = "The name of a row's source is in its field data_source; rename the field."
NO_PENALTY = "There is no such penalty: the policy is trained as it samples."
LOSS_TYPE = (
    "Of TRL's losses grpo and dr_grpo are here; objective.algorithm names the others that are (docs/algorithm.md)."
)
OTHER_GSPO = (
    "verl's and TRL's GSPO is Group Sequence Policy Optimization, another method; objective.algorithm names those that "
    "are here (docs/algorithm.md)."
)
ADAMW = "The optimizer is AdamW; the section optim has its settings: optim.learning_rate, optim.schedule, ..."
REWARD_MANAGER = "One function scores every row, reward.path (docs/reward.md); it sees data_source."

# name -> the settings that a value of it stands for
MEANINGS: dict[str, Callable[[Any], Settings]] = {
    "algorithm.adv_estimator": _objective,
    f"{ACTOR}optim.lr_scheduler_type": _schedule,
    f"{ACTOR}optim.warmup_style": _schedule,
    "lr_scheduler_type": _schedule,
    f"{ACTOR}clip_ratio": lambda value: {"objective.clip_low": value, "objective.clip_high": value},
    "epsilon": lambda value: {"objective.clip_low": value, "objective.clip_high": value},
    "data.filter_overlong_prompts": _if_on("data.overlong", "drop"),
    f"{ACTOR}fsdp_config.param_offload": _if_on("optim.offload", True),
    f"{ACTOR}fsdp_config.optimizer_offload": _if_on("optim.offload", True),
    "critic.model.fsdp_config.param_offload": _if_on("optim.offload", True),
    "trainer.resume_mode": lambda value: {} if value == "resume_path" else {"trainer.resume": value},
    "trainer.resume_from_path": _path_to_resume,
    "report_to": _trackers,
    "mask_truncated_completions": _if_on("rollout.on_cutoff", "skip"),
    "data.reward_fn_key": _only("data.reward_fn_key", "data_source", otherwise=SOURCE_NAME),
    f"{ACTOR}optim.betas": _betas,
    "loss_type": _loss_type,
    f"{ACTOR}policy_loss.loss_mode": _only(f"{ACTOR}policy_loss.loss_mode", "vanilla", otherwise=OTHER_GSPO),
    "importance_sampling_level": _only("importance_sampling_level", "token", otherwise=OTHER_GSPO),
    "optim": _only("optim", "adamw_torch", "adamw_torch_fused", "adamw_hf", otherwise=ADAMW),
    "reward.reward_manager.name": _only("reward.reward_manager.name", "naive", otherwise=REWARD_MANAGER),
    "reward_model.reward_manager": _only("reward_model.reward_manager", "naive", otherwise=REWARD_MANAGER),
    "repetition_penalty": _only("repetition_penalty", 1, otherwise=NO_PENALTY),
    f"{ACTOR}ulysses_sequence_parallel_size": _only(f"{ACTOR}ulysses_sequence_parallel_size", 1, otherwise=ONE_COPY),
}
# what the page says of each
WORDS = {
    "algorithm.adv_estimator": "`objective.algorithm`: grpo, rloo, or ppo for gae",
    f"{ACTOR}optim.lr_scheduler_type": "`optim.schedule`",
    f"{ACTOR}optim.warmup_style": "`optim.schedule`",
    "lr_scheduler_type": "`optim.schedule`",
    f"{ACTOR}clip_ratio": "`objective.clip_low` and `objective.clip_high`",
    "epsilon": "`objective.clip_low` and `objective.clip_high`",
    "data.filter_overlong_prompts": "`data.overlong=drop` where it is true",
    f"{ACTOR}fsdp_config.param_offload": "`optim.offload=true` where it is true",
    f"{ACTOR}fsdp_config.optimizer_offload": "`optim.offload=true` where it is true",
    "critic.model.fsdp_config.param_offload": "`optim.offload=true` where it is true",
    "trainer.resume_mode": "`trainer.resume`: auto, or never for disable; resume_path leaves it to the path",
    "trainer.resume_from_path": "`trainer.resume`",
    "report_to": "`trainer.trackers`; none: none",
    "mask_truncated_completions": "`rollout.on_cutoff=skip` where it is true",
    "data.reward_fn_key": f"data_source is what it can be. {SOURCE_NAME}",
    f"{ACTOR}optim.betas": "`optim.beta1` and `optim.beta2`",
    "loss_type": f"`objective.algorithm` for grpo and dr_grpo. {LOSS_TYPE}",
    f"{ACTOR}policy_loss.loss_mode": f"vanilla is what it can be. {OTHER_GSPO}",
    "importance_sampling_level": f"token is what it can be. {OTHER_GSPO}",
    "optim": f"adamw_torch is what it can be. {ADAMW}",
    "reward.reward_manager.name": f"naive is what it can be. {REWARD_MANAGER}",
    "reward_model.reward_manager": f"naive is what it can be. {REWARD_MANAGER}",
    "repetition_penalty": f"1 is what it can be. {NO_PENALTY}",
    f"{ACTOR}ulysses_sequence_parallel_size": f"1 is what it can be. {ONE_COPY}",
}

# name -> what to do instead; a switch that is off is passed over
KL = "The KL term is part of the loss; objective.kl_coef is its weight."
REWARD_MODEL = "reward.model_path names a reward model, reward.model_weight is its weight."
OWN_CODE = "A model's own code never runs here; take one that transformers knows."
ANSWERS = {
    "beta": (
        "In TRL it is the weight of GRPO's KL term, here objective.kl_coef, or the temperature of DPO, here "
        "objective.preference_beta."
    ),
    "objective.beta": "The preferences' temperature is objective.preference_beta, the KL's weight objective.kl_coef.",
    "algorithm.use_kl_in_reward": KL,
    "algorithm.kl_ctrl.kl_coef": KL,
    f"{ACTOR}entropy_coeff": "There is no entropy term; watch the curve `entropy`, and raise rollout.temperature.",
    "algorithm.norm_adv_by_std_in_grpo": "GRPO without the deviation is objective.algorithm=dr_grpo.",
    "scale_rewards": "GRPO divides by the deviation; objective.algorithm=dr_grpo does not.",
    "reward_model.enable": REWARD_MODEL,
    "reward_model.model.path": REWARD_MODEL,
    "reward_funcs": "Give a Python file, reward.path=reward.py (docs/reward.md).",
    f"{ROLLOUT}multi_turn.enable": "Several turns are not sampled; a prompt may hold many messages.",
    "trust_remote_code": OWN_CODE,
    "model.trust_remote_code": OWN_CODE,
    "data.trust_remote_code": OWN_CODE,
    "actor_rollout_ref.model.trust_remote_code": OWN_CODE,
    "per_device_train_batch_size": (
        "It counts responses a device. data.train_batch_size counts the prompts of a step, over all devices: "
        "per_device_train_batch_size x devices x gradient_accumulation_steps / num_generations."
    ),
    "gradient_accumulation_steps": (
        "Set the prompts of a step, over all devices: data.train_batch_size. How many fit into memory at a time "
        "(optim.micro_batch_tokens) changes no gradient."
    ),
    f"{ACTOR}optim.lr_warmup_steps_ratio": "Give a number of steps: optim.warmup_steps.",
    "warmup_ratio": "Give a number of steps: optim.warmup_steps.",
    "dataset_name": "Give files, data.train_files=[rows.jsonl]; `python -m gspo.convert_data` writes them.",
    "push_to_hub": "Nothing is uploaded; `hf upload NAME outputs/RUN/checkpoints/step_...` does it.",
    "deepspeed": "Weights are sharded by FSDP2; optim.offload=true keeps the optimizer in CPU memory.",
}
PLAIN_LORA = "Adapters are plain LoRA: model.lora={rank: 16, alpha: 32}, which is multiplied by alpha / rank."
NOT_QUANTISED = "The base of an adapter is not quantised; model.precision=bf16 holds it in 2 bytes a weight."
ANSWERS |= {
    **dict.fromkeys(("use_rslora", "use_dora", "lora_modules_to_save", f"{MODEL}exclude_modules"), PLAIN_LORA),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), NOT_QUANTISED),
    f"{MODEL}lora_adapter_path": "Name a checkpoint of ours in trainer.resume, or merge the adapter and train that.",
}
ANSWERS |= {
    "generation_batch_size": (
        "Set the prompts of a step, data.train_batch_size, and the optimizer steps, optim.minibatches."
    ),
    "steps_per_generation": "optim.minibatches says how many optimizer steps a pass over the responses takes.",
    f"{ROLLOUT}ignore_eos": "A response ends at an end token; rollout.max_new_tokens bounds it.",
    "reward_weights": "Return the weighted sum as score, and the parts beside it in a dict (docs/reward.md).",
    "sync_ref_model": "reference.refresh=round makes the reference the opponent of each self-play round.",
    "fp16": "Half precision is bf16: model.precision=bf16, or auto.",
    f"{ACTOR}clip_ratio_c": "There is no second clip; objective.clip_low and objective.clip_high are the bounds.",
    "reward_model.launch_reward_fn_async": "Responses are always scored while others are sampled; leave it out.",
}
TOO_LONG = "Lower the reward in your function, extra_info has finish_reason; or set rollout.on_cutoff=lose, or skip."
ANSWERS |= {
    "trainer.val_only": "eval.py evaluates without training: python eval.py MODEL --data FILE.",
    "data.train_max_samples": "Put fewer rows into the file; trainer.max_steps bounds the run.",
    "data.seed": "The order of the prompts and the sampling have one seed, trainer.seed.",
    "algorithm.filter_groups.enable": (
        "Nothing is sampled in the place of prompts whose responses are rewarded alike; data.spaced=true puts them off."
    ),
    "reward_model.overlong_buffer.enable": TOO_LONG,
    "reward_model.reward_kwargs.overlong_buffer_cfg.enable": TOO_LONG,
}
FALSE_MEANS = ("algorithm.norm_adv_by_std_in_grpo", "scale_rewards")  # here it is False that needs an answer
MINI_BATCH, USE_KL, USE_PEFT = f"{ACTOR}ppo_mini_batch_size", f"{ACTOR}use_kl_loss", "use_peft"
LORA = {  # name -> its key in model.lora
    **dict.fromkeys((f"{MODEL}lora_rank", "model.lora_rank", "lora_rank", "lora_r"), "rank"),
    **dict.fromkeys((f"{MODEL}lora_alpha", "model.lora_alpha", "lora_alpha"), "alpha"),
    **dict.fromkeys((f"{MODEL}target_modules", "target_modules", "lora_target_modules"), "targets"),
    "lora_dropout": "dropout",
}
LATER = (MINI_BATCH, USE_KL, USE_PEFT, *LORA)  # they depend on other settings

LATER_WORDS = {
    MINI_BATCH: "`optim.minibatches` = `data.train_batch_size` / it, which it must divide",
    USE_KL: "`objective.kl_coef=0` where it is false",
    USE_PEFT: "`model.lora`",
    **{name: f"`model.lora.{key}`" for name, key in LORA.items()},
}


def is_foreign(typed: str) -> bool:
    """Return whether `translate` knows the name."""
    name = typed.lstrip("+")
    return name in MEANINGS or name in ANSWERS or name in LATER or bool(why_not_needed(name))


def translate(typed: str, value: Any, place: str, notes: list[str]) -> Settings:
    """Return our settings that a foreign one stands for: none where it needs none, itself where it is one of LATER.

    Note in a line what needs no setting. UserError, with what to do instead, where it has no counterpart.
    """
    name, given = typed.lstrip("+"), plain(value)
    if name in LATER:
        return {name: given}
    if name in ANSWERS:
        if (given in OFF) == (name in FALSE_MEANS):
            raise UserError(f"{place}: {typed} = {given!r} is not understood. {ANSWERS[name]}")
        return {}
    if why := why_not_needed(name):
        notes.append(f"note, {place}: {typed} needs no setting: {why}.")
        return {}
    return MEANINGS[name](given)


def set_later(config: Config, given: Settings) -> None:
    """Set what those of LATER stand for, once everything else is set: mini-batches in prompts, a KL switched off, LoRA.

    UserError where they do not go together.
    """
    if MINI_BATCH in given:
        config.optim.minibatches = steps_of_mini_batches(given[MINI_BATCH], config.data.train_batch_size)
    if given.get(USE_KL, True) in OFF:
        config.objective.kl_coef = 0.0
    if lora := _lora(given):
        if config.model.lora:
            raise UserError(f"model.lora is set, and so is {', '.join(given.keys() & LORA)}; leave one of the two out.")
        config.model.lora = lora


def _lora(given: Settings) -> Settings:
    """Return model.lora as verl's or TRL's names have it; empty where they switch it off: a rank of 0, no use_peft."""
    named = {typed: key for typed, key in LORA.items() if typed in given}
    ranks = [given[typed] for typed, key in named.items() if key == "rank"]
    if given.get(USE_PEFT, True) in OFF or (ranks and ranks[0] in OFF):
        return {}
    if (named or USE_PEFT in given) and not ranks:
        raise UserError(
            f"{next(iter(named), USE_PEFT)} asks for an adapter without its rank. Write model.lora={{rank: 16}}."
        )
    return {key: given[typed] for typed, key in named.items() if given[typed] is not None}


def steps_of_mini_batches(prompts: Any, batch: int) -> int:
    """Return the optimizer steps a pass that mini-batches of so many prompts come to (verl's ppo_mini_batch_size).

    UserError where they do not divide the batch.
    """
    if not isinstance(prompts, int) or prompts < 1 or batch % prompts:
        raise UserError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size = {prompts!r} must divide data.train_batch_size = {batch}; "
            "here optim.minibatches says how many optimizer steps a pass takes."
        )
    return batch // prompts

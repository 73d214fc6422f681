"""Understand settings as users of verl and TRL write them, or answer what to do here instead.

`translate` is asked before a name is looked up. Names that stand for one parameter with the same values are ALIASES
(config_aliases.py). Here are those whose value means something else, those that need no setting, and those that have no
counterpart; a switch of the last kind that is off is passed over.
"""

from collections.abc import Callable
from typing import Any

from gspo.config import Config
from gspo.errors import UserError
from gspo.read_yaml import plain

Settings = dict[str, Any]
ACTOR, ROLLOUT, REF = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout.", "actor_rollout_ref.ref."
MODEL = "actor_rollout_ref.model."
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


def _if_on(key: str, value: Any) -> Callable[[Any], Settings]:
    """Return the meaning of a switch: one setting where it is on, none where it is off."""
    return lambda given: {key: value} if given not in OFF else {}


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
}

# name -> why it needs no setting
PACKED = "micro-batches are filled by tokens, in every forward (optim.micro_batch_tokens)"
ENGINE = "this project's engine samples"
NOT_NEEDED = {
    **dict.fromkeys((f"{ROLLOUT}name", f"{ROLLOUT}mode", "use_vllm", "vllm_mode"), ENGINE),
    **{
        f"{part}{name}": PACKED
        for part in (ACTOR, ROLLOUT, REF)
        for name in (
            *("use_dynamic_bsz", "log_prob_micro_batch_size", "log_prob_micro_batch_size_per_gpu"),
            *("log_prob_use_dynamic_bsz", "log_prob_max_token_len_per_gpu"),
        )
    },
    "actor_rollout_ref.model.use_remove_padding": "responses are always packed, without padding",
    f"{ACTOR}strategy": "weights are sharded by FSDP2 where there are several ranks",
    f"{ACTOR}kl_loss_type": "docs/algorithm.md has the KL term that is trained, and the one that is shown",
    f"{ACTOR}loss_agg_mode": "each objective has its normaliser (docs/algorithm.md)",
    f"{ROLLOUT}gpu_memory_utilization": "keys and values get what the forecast leaves (rollout.kv_memory_gib)",
    f"{ROLLOUT}enforce_eager": "CUDA graphs are used where they can be",
    f"{ROLLOUT}free_cache_engine": "keys and values are freed before the update",
    f"{ROLLOUT}enable_chunked_prefill": "prompts are read in bounded pieces",
    f"{ROLLOUT}load_format": "the sampler has the policy's weights",
    "data.truncation": "a prompt that is too long is an error, or left out (data.overlong)",
    "data.return_raw_chat": "the chat template is applied here",
    "trainer.critic_warmup": "the warm-up of a critic is its own",
    "trainer.balance_batch": "groups are always balanced over the ranks",
    "bf16": "model.precision=auto takes bf16 where it is faster",
    "logging_steps": "every step is logged",
    "log_completions": "trainer.sample_rows groups of each step are in samples.jsonl",
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
    "loss_type": "Name an objective, objective.algorithm (docs/algorithm.md).",
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
FALSE_MEANS = ("algorithm.norm_adv_by_std_in_grpo", "scale_rewards")  # here it is False that needs an answer
MINI_BATCH, USE_KL, USE_PEFT = f"{ACTOR}ppo_mini_batch_size", f"{ACTOR}use_kl_loss", "use_peft"
LORA = {  # name -> its key in model.lora
    **dict.fromkeys((f"{MODEL}lora_rank", "model.lora_rank", "lora_rank", "lora_r"), "rank"),
    **dict.fromkeys((f"{MODEL}lora_alpha", "model.lora_alpha", "lora_alpha"), "alpha"),
    **dict.fromkeys((f"{MODEL}target_modules", "target_modules", "lora_target_modules"), "targets"),
    "lora_dropout": "dropout",
}
LATER = (MINI_BATCH, USE_KL, USE_PEFT, *LORA)  # they depend on other settings


def is_foreign(typed: str) -> bool:
    """Return whether `translate` knows the name."""
    name = typed.lstrip("+")
    return name in MEANINGS or name in NOT_NEEDED or name in ANSWERS or name in LATER


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
    if name in NOT_NEEDED:
        notes.append(f"note, {place}: {typed} needs no setting: {NOT_NEEDED[name]}.")
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

"""Settings as verl's and TRL's users write them: understood, passed over with a word, or answered."""

import pytest

from gspo.config import flatten, to_dict
from gspo.errors import UserError
from gspo.foreign_not_needed import NOT_NEEDED, NOT_NEEDED_SECTIONS
from gspo.foreign_settings import ANSWERS, FALSE_MEANS, LATER, MEANINGS, WORDS
from gspo.read_config import load_config

ACTOR, ROLLOUT, REF = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout.", "actor_rollout_ref.ref."
MODEL = "actor_rollout_ref.model."


def changed(*overrides, file=None):
    """Return {parameter: value} of all that differs from the defaults, and the notes."""
    notes = []
    found = flatten(to_dict(load_config(file, overrides, notes.append)))
    plain = flatten(to_dict(load_config(None, [])))
    return {k: v for k, v in found.items() if v != plain[k] and k != "trainer.run_name"}, notes


# The settings of verl's first example of GRPO.
VERL = (
    "algorithm.adv_estimator=grpo", "data.train_files=a.parquet", "data.val_files=b.parquet",
    "data.train_batch_size=1024", "data.max_prompt_length=512", "data.max_response_length=1024",
    "data.filter_overlong_prompts=True", "data.truncation=error", "actor_rollout_ref.model.path=Qwen/Qwen3-8B",
    f"{ACTOR}optim.lr=2e-6", "actor_rollout_ref.model.use_remove_padding=True", f"{ACTOR}ppo_mini_batch_size=256",
    f"{ACTOR}ppo_micro_batch_size_per_gpu=32", f"{ACTOR}use_kl_loss=True", f"{ACTOR}kl_loss_coef=0.002",
    f"{ACTOR}kl_loss_type=low_var_kl", f"{ACTOR}entropy_coeff=0",
    "actor_rollout_ref.model.enable_gradient_checkpointing=True", f"{ACTOR}fsdp_config.param_offload=False",
    f"{ACTOR}fsdp_config.optimizer_offload=False", f"{ROLLOUT}log_prob_micro_batch_size_per_gpu=32",
    f"{ROLLOUT}tensor_model_parallel_size=2", f"{ROLLOUT}name=vllm", f"{ROLLOUT}gpu_memory_utilization=0.6",
    f"{ROLLOUT}n=5", f"{REF}log_prob_micro_batch_size_per_gpu=32", f"{REF}fsdp_config.param_offload=True",
    "algorithm.use_kl_in_reward=False", "trainer.critic_warmup=0", "trainer.logger=['console','wandb']",
    "trainer.project_name=verl_grpo", "trainer.experiment_name=qwen3_8b", "trainer.n_gpus_per_node=8",
    "trainer.nnodes=1", "trainer.save_freq=20", "trainer.test_freq=5", "trainer.total_epochs=10",
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([f"{MODEL}lora_rank=32", f"{MODEL}lora_alpha=16", f"{MODEL}target_modules=all-linear"],
         {"rank": 32, "alpha": 16, "targets": "all-linear"}),
        ([f"{MODEL}lora_rank=0", f"{MODEL}lora_alpha=16", f"{MODEL}target_modules=all-linear"], None),
        (["use_peft=true", "lora_r=8", "lora_target_modules=[q_proj, v_proj]", "lora_dropout=0.0"],
         {"rank": 8, "targets": ["q_proj", "v_proj"], "dropout": 0.0}),
        (["use_peft=false", "lora_r=8"], None),
        (["model.lora.rank=8", "model.lora.alpha=4"], {"rank": 8, "alpha": 4}),
    ],
)  # fmt: skip
def test_adapters_are_understood_and_switched_off_by_a_rank_of_zero(given, expected):
    found, _ = changed(*given)
    assert found == ({} if expected is None else {"model.lora": expected})


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["lora_alpha=16"], "lora_alpha asks for an adapter without its rank.*model.lora={rank: 16}"),
        (["use_peft=true"], "use_peft asks for an adapter without its rank"),
        (["model.lora={rank: 8}", "lora_r=4"], "model.lora is set, and so is lora_r"),
        (["use_dora=true"], "use_dora = True is not understood. Adapters are plain LoRA"),
        (["load_in_4bit=true"], "not quantised; model.precision=bf16"),
    ],
)
def test_adapters_of_other_kinds_are_answered(given, why):
    with pytest.raises(UserError, match=why):
        load_config(None, given)


def test_verls_first_example_is_understood_whole():
    found, notes = changed(*VERL)
    assert found == {
        "objective.algorithm": "grpo",
        "data.train_files": ["a.parquet"],
        "data.val_files": ["b.parquet"],
        "data.train_batch_size": 1024,
        "data.max_prompt_length": 512,
        "data.overlong": "drop",
        "rollout.max_new_tokens": 1024,
        "rollout.n": 5,
        "rollout.tensor_model_parallel_size": 2,
        "model.path": "Qwen/Qwen3-8B",
        "optim.learning_rate": 2e-6,
        "optim.minibatches": 4,
        "optim.micro_batch_responses": 32,
        "objective.kl_coef": 0.002,
        "model.gradient_checkpointing": True,
        "reference.param_offload": True,
        "trainer.trackers": ["console", "wandb"],
        "trainer.project_name": "verl_grpo",
        "trainer.n_gpus": 8,
        "trainer.nnodes": 1,
        "trainer.save_freq": 20,
        "trainer.total_epochs": 10,
        "eval.freq": 5,
    }
    assert len(notes) == 8 and notes[0] == (
        "note, command line: data.truncation needs no setting: a prompt that is too long is an error, or left out "
        "(data.overlong)."
    )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("algorithm.adv_estimator=rloo", {"objective.algorithm": "rloo"}),
        (f"{ACTOR}clip_ratio=0.1", {"objective.clip_low": 0.1, "objective.clip_high": 0.1}),
        ("epsilon=0.1", {"objective.clip_low": 0.1, "objective.clip_high": 0.1}),
        ("lr_scheduler_type=constant_with_warmup", {}),
        ("lr_scheduler_type=cosine", {"optim.schedule": "cosine"}),
        (f"{ACTOR}optim.warmup_style=cosine", {"optim.schedule": "cosine"}),
        (f"{ACTOR}fsdp_config.optimizer_offload=True", {"optim.offload": True}),
        (f"{ACTOR}use_kl_loss=False", {"objective.kl_coef": 0.0}),
        (f"++{ACTOR}use_kl_loss=False", {"objective.kl_coef": 0.0}),
        ("trust_remote_code=False", {}),
        ("loss_type=dr_grpo", {"objective.algorithm": "dr_grpo"}),
        ("importance_sampling_level=token", {}),
        (f"{ACTOR}policy_loss.loss_mode=vanilla", {}),
        (f"{ACTOR}optim.betas=[0.8, 0.95]", {"optim.beta1": 0.8, "optim.beta2": 0.95}),
        ("optim=adamw_torch", {}),
        ("data.val_max_samples=-1", {}),
        ("data.train_max_samples=-1", {}),
        ("trainer.max_actor_ckpt_to_keep=null", {"trainer.keep_last": 0}),
        ("top_k=null", {}),
        ("min_p=null", {}),
        ("reward.reward_manager.name=naive", {}),
        ("algorithm.filter_groups.enable=False", {}),
        ("scale_rewards=group", {}),
        ("warmup_ratio=0.0", {}),
    ],
)
def test_what_a_value_stands_for(given, meant, tmp_path):
    assert changed(given)[0] == meant
    file = tmp_path / "run.yaml"
    key, value = given.lstrip("+").split("=")
    file.write_text(f"{key}: {value}\n")
    assert changed(file=file)[0] == meant


def test_mini_batches_are_counted_in_prompts_of_whatever_batch_is_given_later():
    assert changed(f"{ACTOR}ppo_mini_batch_size=8", "data.train_batch_size=32")[0]["optim.minibatches"] == 4
    with pytest.raises(UserError, match="ppo_mini_batch_size = 7 must divide data.train_batch_size = 32"):
        changed(f"{ACTOR}ppo_mini_batch_size=7", "data.train_batch_size=32")


@pytest.mark.parametrize("name", ANSWERS)
def test_what_has_no_counterpart_is_answered(name):
    value = "False" if name in FALSE_MEANS else "2"
    with pytest.raises(UserError, match="is not understood") as error:
        changed(f"{name}={value}")
    assert ANSWERS[name] in str(error.value)


def test_an_objective_that_there_is_not_is_an_error():
    with pytest.raises(UserError, match="algorithm.adv_estimator = 'remax' has no counterpart"):
        changed("algorithm.adv_estimator=remax")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (f"{ACTOR}policy_loss.loss_mode=gspo", "verl's and TRL's GSPO is Group Sequence Policy Optimization, another"),
        ("importance_sampling_level=sequence", "verl's and TRL's GSPO is Group Sequence Policy Optimization, another"),
        ("loss_type=dapo", "loss_type = 'dapo' is not understood. Of TRL's losses grpo and dr_grpo are here"),
        ("optim=paged_adamw_8bit", "The optimizer is AdamW"),
        (f"{ACTOR}optim.betas=0.9", "must be two numbers"),
        ("reward.reward_manager.name=dapo", "One function scores every row"),
    ],
)
def test_a_value_that_is_not_here_is_answered(given, why):
    with pytest.raises(UserError, match=why):
        load_config(None, [given])


@pytest.mark.parametrize("section", NOT_NEEDED_SECTIONS)
def test_whole_sections_are_passed_over_with_a_word(section):
    name = f"{section}further.name"
    assert changed(f"+{name}=1") == (
        {},
        [f"note, command line: +{name} needs no setting: {NOT_NEEDED_SECTIONS[section]}."],
    )


def test_the_page_has_a_word_for_every_value_that_means_something_else():
    assert WORDS.keys() == MEANINGS.keys()


def test_no_name_has_two_meanings():
    from gspo.config import PARAMETERS
    from gspo.config_aliases import ALIASES

    tables = (PARAMETERS, ALIASES, MEANINGS, NOT_NEEDED, ANSWERS, LATER)
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("typed", "guess"),
    [
        (f"{ROLLOUT}temprature", f"{ROLLOUT}temperature"),
        (f"{ACTOR}optim.weight_decey", f"{ACTOR}optim.weight_decay"),
        (f"{ROLLOUT}skip_rollout", None),  # they share no more than where they stand
        (f"{ACTOR}optim.num_cycles", None),
        ("data.custom_cls.path", None),
        ("trainer.val_once", None),
    ],
)
def test_a_guess_at_an_unknown_name_is_like_it_in_its_last_part(typed, guess):
    with pytest.raises(UserError) as error:
        load_config(None, [f"{typed}=1"])
    said = f"; did you mean {guess!r}?" if guess else "."
    assert str(error.value) == f"command line: unknown key {typed!r}{said} `python -m gspo.parameters` lists every key."


def test_all_unknown_names_are_one_error(tmp_path):
    with pytest.raises(UserError) as error:
        changed("optim.learning_rat=1", "rollout.n=4", "zzz.qqq=2")
    assert str(error.value) == (
        "command line: unknown key 'optim.learning_rat'; did you mean 'optim.learning_rate'? "
        "command line: unknown key 'zzz.qqq'. `python -m gspo.parameters` lists every key."
    )
    file = tmp_path / "own.yaml"
    file.write_text("rollout: {m: 4}\ntrainer: {seed: 1}\n")
    with pytest.raises(UserError) as error:
        load_config(file, ["zzz.qqq=2"])
    assert str(error.value).startswith(f"{file}: unknown key 'rollout.m'; did you mean 'rollout.n'? command line: ")

"""Map the original description's names (those without a dot) and verl's to our parameters, and each `objective.form` to
the settings that it stands for."""

# name -> parameter
ALIASES = {
    "model_path": "model.path",
    "rollout_n": "rollout.n",
    "rollout_temperature": "rollout.temperature",
    "self_play_rounds": "selfplay.rounds",
    "preference_beta": "objective.preference_beta",
    "margin": "objective.margin",
    "use_ranking_loss": "objective.use_ranking_loss",
    "train_batch_size": "data.train_batch_size",
    "learning_rate": "optim.learning_rate",
    "total_epochs": "trainer.total_epochs",
    "reward_func": "reward.path",
    "algorithm": "objective.algorithm",
    "n_gpus": "trainer.n_gpus",
    "run_name": "trainer.run_name",
    "output_dir": "trainer.output_dir",
    "actor_rollout_ref.model.path": "model.path",
    "actor_rollout_ref.rollout.n": "rollout.n",
    "actor_rollout_ref.rollout.temperature": "rollout.temperature",
    "actor_rollout_ref.rollout.top_p": "rollout.top_p",
    "actor_rollout_ref.rollout.top_k": "rollout.top_k",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "rollout.tensor_model_parallel_size",
    "actor_rollout_ref.actor.optim.lr": "optim.learning_rate",
    "actor_rollout_ref.actor.grad_clip": "optim.grad_clip",
    "actor_rollout_ref.actor.kl_loss_coef": "objective.kl_coef",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "optim.micro_batch_responses",
    "actor_rollout_ref.actor.fsdp_config.fsdp_size": "model.shard_size",
    "actor_rollout_ref.actor.fsdp_config.reshard_after_forward": "model.reshard_after_forward",
    "actor_rollout_ref.actor.fsdp_config.offload_policy": "optim.offload",
    "actor_rollout_ref.ref.fsdp_config.param_offload": "reference.param_offload",
    "data.max_response_length": "rollout.max_new_tokens",
    "custom_reward_function.path": "reward.path",
    "custom_reward_function.name": "reward.name",
    "custom_reward_function.reward_kwargs": "reward.reward_kwargs",
    "trainer.n_gpus_per_node": "trainer.n_gpus",
    "trainer.resume_mode": "trainer.resume",
    "trainer.default_local_dir": "trainer.output_dir",
    "trainer.logger": "trainer.trackers",
    "trainer.experiment_name": "trainer.run_name",
    "trainer.test_freq": "eval.freq",
    "trainer.total_training_steps": "trainer.max_steps",
    "data.apply_chat_template_kwargs": "data.chat_template_kwargs",
    "actor_rollout_ref.actor.optim.lr_warmup_steps": "optim.warmup_steps",
}
# objective.form -> the settings that it stands for
FORMS = {
    "default": {},
    "seed": {  # the algorithm of the original description: -E[log sigma(beta (log pi(y_w) - log pi(y_l)))]
        "objective.algorithm": "gspo",
        "objective.anchor": "none",  # nothing is subtracted from the log-probs
        "objective.after_fork": 1.0,  # of whole responses
        "objective.length_norm": "sum",
        "objective.pair_weight": "one",
        "objective.normalizer": "batch",  # E: the mean over all pairs of the batch
        "objective.nll_coef": 0.0,
        "data.shuffle": True,
        "data.spaced": False,  # every prompt once an epoch
    },
}
# (parameter, value as verl writes it) -> value
VALUE_ALIASES = {
    ("trainer.resume", "disable"): "never",
    ("rollout.top_k", -1): 0,
    ("eval.freq", -1): 0,
    ("eval.prompts", -1): None,
    ("optim.micro_batch_responses", -1): None,
    ("optim.warmup_steps", -1): 0,
    ("trainer.keep_last", -1): 0,
    ("trainer.max_steps", -1): None,
    ("trainer.save_freq", -1): 0,
    ("model.shard_size", -1): None,
}

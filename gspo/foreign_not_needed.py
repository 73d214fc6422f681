"""Say why settings of verl and TRL need none here: what they switch on is always done, or is not there to be set."""

ACTOR, ROLLOUT, REF = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout.", "actor_rollout_ref.ref."
MODEL = "actor_rollout_ref.model."

# name -> why it needs no setting
PACKED = "micro-batches are filled by tokens, in every forward (optim.micro_batch_tokens)"
ENGINE = "this project's engine samples"
EVALUATION = "evaluation samples as training does, and shows greedy accuracy beside"
CRITIC = "the critic is cut into passes and recomputed as the policy is, and opened from model.path"
KEPT = "checkpoints are kept by trainer.keep_last and trainer.keep_best, the critic's inside them"
NOT_NEEDED: dict[str, str] = {
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
    **{f"{ROLLOUT}val_kwargs.{name}": EVALUATION for name in ("temperature", "top_p", "top_k", "do_sample")},
    **dict.fromkeys(
        (
            *("critic.model.path", "critic.model.use_remove_padding", "critic.model.enable_gradient_checkpointing"),
            *("critic.ppo_micro_batch_size_per_gpu", "critic.ppo_mini_batch_size", "critic.ppo_epochs"),
            *("critic.model.fsdp_config.optimizer_offload", "critic.use_dynamic_bsz", "critic.strategy"),
        ),
        CRITIC,
    ),
    **dict.fromkeys(("trainer.max_critic_ckpt_to_keep", "trainer.remove_previous_ckpt_in_save"), KEPT),
    **dict.fromkeys((f"{ROLLOUT}max_num_batched_tokens", f"{ROLLOUT}enable_prefix_caching"), ENGINE),
    **dict.fromkeys((f"{ROLLOUT}dtype", f"{ROLLOUT}disable_log_stats", f"{ROLLOUT}max_model_len"), ENGINE),
    **dict.fromkeys(("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_max_model_length"), ENGINE),
    f"{ROLLOUT}do_sample": "training always samples",
    f"{ACTOR}use_torch_compile": "kernels of this project do what is compiled there",
    f"{ACTOR}checkpoint.save_contents": "a checkpoint holds the model, the optimizer and all that a run goes on with",
    "data.val_batch_size": "held-out prompts are sampled all at once, as far as memory goes",
    "data.filter_overlong_prompts_workers": "prompts are bounded before they are tokenized",
    "data.dataloader_num_workers": "prompts are read when they are needed",
    "algorithm.kl_ctrl.type": "the weight of the KL term is fixed",
    "trainer.log_val_generations": "trainer.sample_rows groups of each step are in samples.jsonl",
    "trainer.rollout_data_dir": "trainer.sample_rows groups of each step are in samples.jsonl",
    "trainer.validation_data_dir": "answers to the test prompts are in eval_before.json and eval_after.json",
    "trainer.default_hdfs_dir": "a run's folder is on a file system that is mounted here (trainer.output_dir)",
    "trainer.device": "CUDA where there is a GPU, else the CPU",
    "per_device_eval_batch_size": "held-out prompts are sampled all at once, as far as memory goes",
    "gradient_checkpointing_kwargs": "activations are recomputed layer by layer",
    "remove_unused_columns": "further columns of a row go into extra_info",
    "save_strategy": "trainer.save_freq counts steps",
    "eval_strategy": "eval.freq counts steps",
    "logging_strategy": "every step is logged",
    "do_train": "train.py trains, eval.py evaluates",
    "do_eval": "eval.freq and eval.before_and_after say when",
    "disable_dropout": "a policy is trained without dropout",
    "trainer.balance_batch": "groups are always balanced over the ranks",
    "bf16": "model.precision=auto takes bf16 where it is faster",
    "logging_steps": "every step is logged",
    "log_completions": "trainer.sample_rows groups of each step are in samples.jsonl",
}
KERNELS = "kernels of this project do what is fused there"
PRECISION = "weights are kept in fp32, and multiplied as model.precision says"
ENTROPY = "the entropy is measured in passes of bounded memory"
LENGTHS = "data.max_prompt_length and rollout.max_new_tokens bound the lengths"
BEST = "trainer.keep_best keeps the checkpoint with the best held-out accuracy"
LAUNCHER = "there is no Ray, Hydra or profiler here; torchrun starts the processes"
MISMATCH = "what sampler and trainer differ by is weighed (objective.max_mismatch_weight)"
FILTER = "it goes with a switch that is answered by itself"
NOT_NEEDED |= {
    **dict.fromkeys((f"{MODEL}use_liger", f"{MODEL}use_fused_kernels", "use_liger_kernel", "use_liger_loss"), KERNELS),
    "torch_compile": NOT_NEEDED[f"{ACTOR}use_torch_compile"],
    **dict.fromkeys(
        (f"{MODEL}use_shm", f"{MODEL}external_lib", "data.use_shm"), "a model and rows are read from files"
    ),
    f"{MODEL}enable_activation_offload": "model.gradient_checkpointing and optim.micro_batch_tokens bound activations",
    **dict.fromkeys(
        (f"{MODEL}override_config.attn_implementation", "attn_implementation", "model_init_kwargs.attn_implementation"),
        "attention is computed by this project",
    ),
    **dict.fromkeys(
        (f"{ACTOR}fsdp_config.model_dtype", f"{ACTOR}fsdp_config.dtype", "torch_dtype", "dtype"), PRECISION
    ),
    **dict.fromkeys(("model_init_kwargs.dtype", "model_init_kwargs.torch_dtype"), PRECISION),
    **{
        f"{part}{name}": ENTROPY
        for part in (ACTOR, REF)
        for name in ("entropy_checkpointing", "entropy_from_logits_with_chunking")
    },
    f"{ACTOR}calculate_entropy": "the entropy is always measured",
    **dict.fromkeys((f"{ACTOR}fsdp_config.forward_prefetch", f"{REF}strategy"), NOT_NEEDED[f"{ACTOR}strategy"]),
    "ddp_find_unused_parameters": NOT_NEEDED[f"{ACTOR}strategy"],
    f"{ACTOR}checkpoint.load_contents": NOT_NEEDED[f"{ACTOR}checkpoint.save_contents"],
    f"{ACTOR}optim.total_training_steps": "a schedule ends with the run",
    **dict.fromkeys((f"{ACTOR}ppo_micro_batch_size", "auto_find_batch_size", "group_by_length"), PACKED),
    f"{ROLLOUT}calculate_log_probs": "the sampler always keeps them",
    **dict.fromkeys((f"{ROLLOUT}prompt_length", f"{ROLLOUT}response_length"), LENGTHS),
    **dict.fromkeys((f"{ROLLOUT}layered_summon", f"{ROLLOUT}multi_stage_wake_up", "cache_implementation"), ENGINE),
    "actor_rollout_ref.hybrid_engine": "sampling and training always share the devices",
    "algorithm.kl_penalty": NOT_NEEDED[f"{ACTOR}kl_loss_type"],
    "critic.enable": "objective.algorithm=ppo has a critic, and no other",
    **dict.fromkeys(("data.return_raw_input_ids", "data.return_full_prompt"), NOT_NEEDED["data.return_raw_chat"]),
    "data.validation_shuffle": "held-out prompts keep their order",
    **dict.fromkeys(
        ("trainer.use_legacy_worker_impl", "trainer.esi_redundant_time", "trainer.profile_steps"), LAUNCHER
    ),
    "trainer.ray_wait_register_center_timeout": LAUNCHER,
    "trainer.del_local_ckpt_after_load": KEPT,
    **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory"), NOT_NEEDED["data.dataloader_num_workers"]),
    **dict.fromkeys(("num_completions_to_print", "wandb_log_unique_prompts"), NOT_NEEDED["log_completions"]),
    "logging_first_step": NOT_NEEDED["logging_steps"],
    "logging_dir": "curves are in the run's folder",
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "save_only_model"), BEST),
    "overwrite_output_dir": "trainer.resume says what becomes of a run that is in the folder",
    "padding_side": NOT_NEEDED["actor_rollout_ref.model.use_remove_padding"],
    "do_predict": NOT_NEEDED["do_train"],
    "vllm_importance_sampling_correction": MISMATCH,
}
NOT_NEEDED_SECTIONS = {  # all names that begin so
    **dict.fromkeys(("ray_kwargs.", "ray_init.", "hydra.", "global_profiler."), LAUNCHER),
    **dict.fromkeys((f"{ROLLOUT}engine_kwargs.", f"{ROLLOUT}agent.", f"{ROLLOUT}checkpoint_engine."), ENGINE),
    "algorithm.rollout_correction.": MISMATCH,
    "algorithm.filter_groups.": FILTER,
    "reward_model.overlong_buffer.": FILTER,
    "reward_model.reward_kwargs.overlong_buffer_cfg.": FILTER,
}


def why_not_needed(name: str) -> str:
    """Return why a setting of verl or TRL needs none here; "" where it does, or is unknown."""
    found = (why for section, why in NOT_NEEDED_SECTIONS.items() if name.startswith(section))
    return NOT_NEEDED.get(name) or next(found, "")

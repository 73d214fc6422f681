"""List the tasks, methods and variants that learning.py trains, each as settings of train.py."""

EVERY = 16  # steps between evaluations on the dev split
POOL, EPOCHS = 256, 3  # training prompts, of 16 steps an epoch
TUNING_SEEDS = (100, 101)  # of the runs that choose step sizes and KL weights; no run of a table has them
TUNING = ["eval.n=4"]  # those runs on the report tasks: half the samples of each evaluation


def _embedded(name: str, max_new_tokens: int, *more: str) -> list[str]:
    """Return the settings of an embedded task: its splits, and the longest response."""
    return [
        f"data.train_files=[data/{name}/train_{POOL}.json]",
        f"data.val_files=[data/{name}/dev.json]",
        f"data.test_files=[data/{name}/test.json]",
        f"rollout.max_new_tokens={max_new_tokens}",
        *more,
    ]


# Everything that is a matter of choice was chosen on the development tasks, by their test splits too, before any method
# was trained on a report task. There, each method's step size and KL weight are chosen on the task's dev split.
DEVELOPMENT = {
    "equations": _embedded("equations", 32),
    "systems": _embedded(
        "systems", 64, "model.path=gspo/embedded/systems_model", "reward.path=benchmarks/systems_reward.py"
    ),
}
REPORT = {
    "sorting": _embedded(
        "sorting", 64, "model.path=gspo/embedded/sorting_model", "reward.path=benchmarks/sorting_reward.py"
    ),
    "weekdays": _embedded("weekdays", 64, "model.path=gspo/embedded/weekdays_model"),
    "brackets": _embedded(
        "brackets", 64, "model.path=gspo/embedded/brackets_model", "reward.path=benchmarks/brackets_reward.py"
    ),
}
TASKS = {**DEVELOPMENT, **REPORT}

COMMON = [
    *("rollout.n=8", "data.train_batch_size=16", "selfplay.rounds=2", "trainer.max_steps=48", "data.spaced=false"),
    *("optim.schedule=cosine", "optim.min_lr_ratio=0.1", "optim.warmup_steps=5"),
    *("optim.epochs_per_rollout=2", "optim.minibatches=2"),
    *("eval.n=8", "eval.prompts=256", "eval.round_prompts=128", f"eval.freq={EVERY}", "eval.before_and_after=false"),
    *("trainer.save_freq=0", "trainer.keep_last=1", "trainer.sample_rows=0", "reward.workers=1", "reward.check_rows=0"),
]
FAST = ["trainer.max_steps=12", "optim.warmup_steps=2", "eval.prompts=96", "eval.round_prompts=64", "eval.freq=4"]

# The original description's formula, and the differences from it that are on trial, one at a time and together.
ORIGINAL = ["objective.anchor=none", "objective.after_fork=1", "objective.normalizer=batch", "data.spaced=false"]
ANCHOR, FORK = ["objective.anchor=opponent"], ["objective.after_fork=0.3"]
CONSTANT, SPACED = ["objective.normalizer=constant"], ["data.spaced=true"]
BRANCH_WEIGHTS = ["objective.pair_weight=branch"]
TREE = ["rollout.n=12", "rollout.trunks=4"]  # samples about as many tokens as 8 whole responses
EIGHT_STEPS = ["optim.epochs_per_rollout=4"]  # of two mini-batches
VARIANTS = {
    "original": ORIGINAL,
    "fork": [*ORIGINAL, *FORK],
    "anchor, fork, constant Z": [*ORIGINAL, *ANCHOR, *FORK, *CONSTANT],
    "tree": [*ORIGINAL, *TREE],
    "tree, branch weights": [*ORIGINAL, *TREE, *BRANCH_WEIGHTS],
    "spaced": [*ORIGINAL, *SPACED],
    "anchor": [*ORIGINAL, *ANCHOR],
    "branch weights": [*ORIGINAL, *BRANCH_WEIGHTS],
    "anchor, fork, constant Z, spaced": [*ORIGINAL, *ANCHOR, *FORK, *CONSTANT, *SPACED],
    "anchor, fork, constant Z, tree": [*ORIGINAL, *ANCHOR, *FORK, *CONSTANT, *TREE],
    "no ranking": [*ORIGINAL, "objective.use_ranking_loss=false"],
    "gap weights": [*ORIGINAL, "objective.pair_weight=gap"],
    "8 steps": [*ORIGINAL, *EIGHT_STEPS],
}
# Chosen by the development tasks: anchor, fork and constant Z together, and the same with trees. The rest was not ahead
# (docs/experiments.md).
CANDIDATE = [*ORIGINAL, *ANCHOR, *FORK, *CONSTANT]
PPO = ["objective.algorithm=ppo", "objective.anchor=none", "critic.learning_rate=1e-3"]  # as configs/ppo.yaml
# From pairs that the model made before training (write_pairs in learning.py): of as many responses as the others
# sample, and in as many optimizer steps.
OFFLINE_DPO = [
    *("objective.algorithm=dpo", "reference.refresh=never", "data.train_files=[data/{task}/pairs.jsonl]"),
    *("data.train_batch_size=8", "optim.epochs_per_rollout=1", "optim.minibatches=1", "optim.warmup_steps=20"),
    *(f"trainer.max_steps={4 * 48}", f"eval.freq={4 * EVERY}"),
]
METHODS = {
    "GSPO": ORIGINAL,  # the default
    "GSPO with anchor, fork, constant Z": CANDIDATE,
    "GSPO with these and trees": [*CANDIDATE, *TREE],
    "RLOO": ["objective.algorithm=rloo"],  # Dr. GRPO is the same but for the constant (N - 1) / N
    "GRPO": ["objective.algorithm=grpo"],
    "MaxRL": ["objective.algorithm=maxrl"],
    "TEMPO": ["objective.algorithm=tempo"],
    "online DPO": ["objective.algorithm=online_dpo"],
    "SPIN": ["objective.algorithm=spin"],
    "PPO": PPO,
    "offline DPO": OFFLINE_DPO,
}
# What a search varies beside the step size, and the values of both that it begins with.
KL_WEIGHT = ("objective.kl_coef", (2e-4, 1e-3))
SECOND = {
    "offline DPO": ("objective.preference_beta", (1e-4, 0.1))
}  # it has no KL term: beta holds it to the reference

"""Define every parameter: its section, type, default, meaning and range, and the other names that users may type.

`python -m gspo.parameters` prints them all as a Markdown page. read_config.py fills a `Config` from a
YAML file and the command line; the resolved values are written beside each run.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from gspo.config_aliases import ALIASES
from gspo.config_critic import Critic
from gspo.config_health import Health
from gspo.config_objective import Objective
from gspo.config_option import opt


@dataclass
class Model:
    """The model that is trained, and how it is sharded over the ranks."""

    path: str | None = opt(None, "Hugging Face folder or hub name; empty: the embedded model", path=True)
    lora: dict[str, Any] = opt(
        {},
        "train an adapter instead of the weights: {rank: 16, alpha: 32, targets: [q_proj, v_proj]}; alpha is twice the "
        "rank and targets are all linear layers of the decoder if left out; empty: all weights are trained",
    )
    precision: Literal["auto", "fp32", "bf16"] = opt(
        "auto",
        "number format of matrix products; weights and optimizer stay fp32. auto: bf16 on CUDA; on a CPU, the faster "
        "one, measured once",
    )
    tf32: bool = opt(
        False,
        "GPUs from Ampere on: round what fp32 products multiply to TF32, 10 bits after the point instead of 23; of use "
        "with precision=fp32",
    )
    gradient_checkpointing: bool | Literal["auto"] = opt(
        "auto",
        "recompute activations in the backward pass: less memory, a third more time. auto: on a GPU, where they would "
        "be most of what a step takes",
    )
    shard_size: int | None = opt(
        None,
        "ranks one copy of the weights is sharded over, e.g. the GPUs of a node (HSDP); empty: all ranks (FSDP)",
        ge=1,
    )
    reshard_after_forward: bool = opt(
        True,
        "free a layer's gathered weights after its forward; false: keep them for the backward (faster, more memory)",
    )


@dataclass
class Data:
    """The prompts: where they are read from, and in what order they are trained on."""

    train_files: list[str] = opt(
        [],
        "training prompts: JSON, JSONL, CSV or parquet; `embedded`, or empty where model.path is empty too: the "
        "embedded equations",
        path=True,
    )
    val_files: list[str] = opt([], "held-out prompts for the win rate of each round", path=True)
    test_files: list[str] = opt([], "prompts for the evaluation before and after training; empty: val_files", path=True)
    train_batch_size: int = opt(256, "prompts per step, over all ranks", ge=1, le=10**7)
    max_prompt_length: int = opt(1024, "longest prompt in tokens, chat template included", ge=1)
    overlong: Literal["error", "drop"] = opt("error", "what to do with a longer prompt")
    prompt_key: str | None = opt(
        None, "field of a row that holds the prompt; empty: prompt, else one that is known (docs/data.md)"
    )
    truth_key: str | None = opt(
        None, "field of a row that holds the ground truth; empty: ground_truth, else one that is known (docs/data.md)"
    )
    shuffle: bool = opt(True, "draw a new order of the prompts every epoch")
    spaced: bool = opt(
        False,
        "put a prompt off for 1, then 3, then 7 epochs each time its responses are rewarded alike, all right or all "
        "wrong: nothing is learned from them (spaced repetition)",
    )
    system_prompt: str | None = opt(None, "system message for every prompt that has none")
    chat_template: str | None = opt(
        None, "file with a Jinja chat template, for a model that has none, or instead of its own", path=True
    )
    chat_template_kwargs: dict[str, Any] = opt({}, "further arguments for the tokenizer's chat template")


@dataclass
class Rollout:
    """Sampling: how responses to the prompts are generated."""

    n: int = opt(8, "responses per prompt (the group size)", ge=2, le=65536)
    source: Literal["auto", "policy", "rows"] = opt(
        "auto",
        "where the responses to learn from come from. policy: it samples them; rows: the training rows hold them "
        "(chosen and rejected, or responses and rewards); auto: rows for dpo, else policy",
    )
    trunks: int | None = opt(
        None,
        "make each group a tree: so many whole responses, and n / trunks - 1 branches sampled from inside each; empty: "
        "n independent responses",
        ge=2,
    )
    branch_at: Literal["entropy", "even", "most_uncertain", "fractions"] = opt(
        "entropy",
        "where a trunk branches. entropy: wherever its summed entropy has grown by branch_every; even: every "
        "branch_every tokens; most_uncertain: at its tokens of largest entropy, fractions: at even shares of its "
        "length (these two look ahead, which biases the gradient)",
    )
    branch_every: float | None = opt(
        None,
        "entropy: nats, even: tokens between two places of a trunk; empty: so many that the last step's mean response "
        "would have a place for each branch",
        gt=0.0,
    )
    temperature: float = opt(0.9, "sampling temperature; training uses the same", gt=0.0)
    top_p: float = opt(
        1.0, "nucleus sampling; below 1, the trained distribution differs from the sampled one", gt=0.0, le=1.0
    )
    top_k: int = opt(0, "sample from the k likeliest tokens only; 0: off", ge=0)
    min_p: float = opt(
        0.0, "drop tokens less likely than this share of the likeliest one's probability; 0: off", ge=0.0, lt=1.0
    )
    max_new_tokens: int = opt(512, "longest response in tokens", ge=1, le=10**7)
    on_cutoff: Literal["keep", "lose", "skip"] = opt(
        "keep",
        "responses cut off at max_new_tokens. keep: as they are scored; lose: behind all that ended; skip: nothing is "
        "learned from them. Curves and samples show the scores as they are",
    )
    stop: list[str] = opt([], "stop strings: a response also ends after one of these, and keeps it")
    skip_special_tokens: bool = opt(
        False,
        "leave all special tokens out of the text that rewards and samples see, also tags such as <think>; false: only "
        "end and padding",
    )
    engine: str = opt("paged", "rollout engine: a name in gspo/rollout/engines.py")
    max_slots: int | Literal["auto"] = opt(
        "auto",
        "most responses a rank generates at the same time, if kv_memory_gib holds them. auto: 1024 on a GPU, 256 "
        "on a CPU",
        ge=1,
    )
    kv_memory_gib: float | Literal["auto"] = opt(
        "auto", "memory of a rank's KV cache in GiB; auto: half of the free memory", gt=0.0
    )
    tensor_model_parallel_size: int = opt(1, "ranks that share one copy of the sampler's weights", ge=1)
    weights: Literal["auto", "share", "copy"] = opt(
        "auto",
        "share: sample with the policy's own parameters (one process, fp32); copy: with a copy of them; auto: share "
        "where possible",
    )


@dataclass
class Reward:
    """The reward function, and the processes that call it."""

    path: str | None = opt(None, "your Python file with compute_score; empty: gspo/reward/reward_func.py", path=True)
    name: str = opt("compute_score", "name of the function in that file")
    reward_kwargs: dict[str, Any] = opt({}, "further keyword arguments for the function")
    workers: int | None = opt(
        None, "worker processes per rank that call the function; empty: the rank's share of the CPU cores", ge=1
    )
    timeout_s: float = opt(10.0, "seconds after which a call is ended", gt=0.0, le=1e6)
    on_error: Literal["zero", "skip_group", "stop"] = opt(
        "zero",
        "when a call raises, times out or returns no score. zero: the response scores 0; skip_group: leave its group "
        "out; stop: end the run",
    )
    memory_gib: float = opt(4.0, "memory limit of one worker process in GiB; 0: none", ge=0.0)
    concurrency: int = opt(16, "calls at the same time in one worker process, for async functions", ge=1)
    env: list[str] = opt(
        [],
        "environment variables that the function gets although they look like secrets (*_TOKEN, *_KEY, *_SECRET, "
        "*PASSWORD*, *_CREDENTIALS)",
    )
    range: list[float] = opt(
        [],
        "[lowest, highest] reward: what lies outside is a fault, and a faulty call scores the lowest; empty: any "
        "finite number is a reward",
    )
    correct_at: float | None = opt(
        None,
        "a response is right from this reward on, where the function returns no `acc`; empty: from the top of "
        "reward.range, or from the highest reward of right answers in the check before training, at least 1",
    )
    model_path: str | None = opt(
        None,
        "a reward model (Hugging Face folder or hub name, sequence classification with one label) whose score is added "
        "to the function's",
        path=True,
    )
    model_weight: float = opt(1.0, "what the reward model's score is multiplied with")
    check_rows: int = opt(
        16,
        "training rows on which to check, before training, that a right answer scores above a wrong one; 0: no check",
        ge=0,
    )


@dataclass
class SelfPlay:
    """The rounds of self-play."""

    rounds: int = opt(
        3,
        "rounds; when one starts, the opponent becomes a copy of the policy. A run that is extended has more of them",
        ge=1,
        le=10**6,
    )


@dataclass
class Reference:
    """The frozen models: the opponent, and the reference of the KL term."""

    param_offload: bool | Literal["auto"] = opt(
        "auto",
        "keep the opponent and the reference in CPU memory between uses. auto: on a GPU, unless the memory forecast "
        "has room for them",
    )
    refresh: Literal["round", "never"] = opt(
        "round", "reference of the KL term. round: the opponent of the round; never: the initial model"
    )


@dataclass
class Optim:
    """The optimizer, and how a step is cut into passes that fit into memory."""

    learning_rate: float = opt(1e-6, "peak learning rate of AdamW", gt=0.0)
    schedule: Literal["constant", "linear", "cosine"] = opt("constant", "learning rate after the warm-up")
    min_lr_ratio: float = opt(0.0, "linear, cosine: learning rate at the end, as a share of the peak", ge=0.0, le=1.0)
    warmup_steps: int = opt(0, "steps of linear warm-up", ge=0)
    weight_decay: float = opt(0.0, "weight decay of matrices; norms and biases have none", ge=0.0)
    beta1: float = opt(0.9, "decay rate of AdamW's mean gradient", ge=0.0, lt=1.0)
    beta2: float = opt(0.99, "decay rate of AdamW's mean squared gradient", ge=0.0, lt=1.0)
    grad_clip: float = opt(1.0, "largest global norm of the gradient; a larger one is scaled down to it", gt=0.0)
    epochs_per_rollout: int = opt(1, "passes over a rollout", ge=1)
    minibatches: int = opt(1, "optimizer steps per pass", ge=1)
    micro_batch_tokens: int | Literal["auto"] = opt(
        "auto",
        "most tokens in one forward and backward on a rank, a group's prompt counted once; the gradient does not "
        "depend on it. auto: 16384, and on a GPU half as many, down to 1024, until the memory forecast fits",
        ge=1,
    )
    micro_batch_responses: int | None = opt(None, "most responses in one forward and backward; empty: no limit", ge=1)
    gradient_reduction: Literal["micro_batch", "step"] = opt(
        "micro_batch",
        "several ranks: when gradients are summed over them. step: once, less to send, but each rank holds the whole "
        "gradient",
    )
    offload: bool = opt(
        False, "keep weights, gradients and AdamW's moments in CPU memory and take the step there; slower"
    )


@dataclass
class Eval:
    """Evaluation on held-out and on test prompts."""

    n: int = opt(8, "responses per prompt", ge=1, le=65536)
    prompts: int | None = opt(None, "use only this many prompts, the first of test_files; empty: all", ge=1)
    round_prompts: int = opt(
        64, "held-out prompts for the win rate of each round and preference_accuracy; 0: none", ge=0
    )
    freq: int = opt(0, "steps between evaluations on the held-out prompts; 0: only when a round ends", ge=0)
    before_and_after: bool = opt(True, "evaluate on test_files before and after training")


@dataclass
class Trainer:
    """The run: its length, its checkpoints and its folder."""

    total_epochs: int = opt(
        15, "length of the run: the steps of this many passes over all training prompts", ge=1, le=10**6
    )
    max_steps: int | None = opt(None, "stop after this many steps, whatever total_epochs says", ge=1, le=10**9)
    stop_when: dict[str, Any] = opt(
        {},
        "end the run, as after its last step, when a curve passes a bound: {metric: heldout/accuracy, above: 0.9, "
        "patience: 2}; patience counts measurements in a row, 1 if left out",
    )
    time_limit: str | None = opt(
        None,
        "leave with a checkpoint, as on SIGTERM, before a step would end later than this after the start: 90s, 45m, "
        "1h30m, 2d, 23:30:00; empty: never",
    )
    save_freq: int = opt(50, "steps between checkpoints; one is always written at the end; 0: only that one", ge=0)
    keep_last: int = opt(3, "checkpoints to keep; 0: all", ge=0)
    keep_best: bool = opt(True, "also save and keep the checkpoint with the best held-out accuracy, as `best`")
    async_save: bool = opt(True, "write checkpoints while training goes on, from a copy in CPU memory")
    output_dir: str = opt("outputs", "folder that holds the folders of all runs", path=True)
    run_name: str | None = opt(None, "folder name of the run; empty: the name of the config file")
    trackers: list[str] = opt(
        ["tensorboard"],
        "where curves are sent besides metrics.jsonl, any of tensorboard, wandb, swanlab, trackio, mlflow",
    )
    project_name: str = opt("gspo", "project (mlflow: experiment) under which trackers file the run")
    seed: int = opt(0, "random seed of sampling and data order", ge=0, lt=10**18)
    resume: str = opt(
        "auto",
        "auto: go on where the run stopped; force: ... with other step sizes and coefficients; never: start anew; a "
        "checkpoint folder: start a run from that checkpoint",
        path=True,
    )
    sample_rows: int = opt(8, "groups per step written to samples.jsonl", ge=0)
    n_gpus: int | None = opt(None, "processes per node; checked against torchrun's", ge=1)
    nnodes: int | None = opt(None, "nodes; checked against torchrun's", ge=1)


@dataclass
class Config:
    """All parameters of a run, one field per section."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    rollout: Rollout = field(default_factory=Rollout)
    reward: Reward = field(default_factory=Reward)
    objective: Objective = field(default_factory=Objective)
    critic: Critic = field(default_factory=Critic)
    selfplay: SelfPlay = field(default_factory=SelfPlay)
    reference: Reference = field(default_factory=Reference)
    optim: Optim = field(default_factory=Optim)
    eval: Eval = field(default_factory=Eval)
    health: Health = field(default_factory=Health)
    trainer: Trainer = field(default_factory=Trainer)


def parameters(node: Any = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Return every parameter: `section.name` -> its dataclass field."""
    found = {}
    for f in dataclasses.fields(node):
        if dataclasses.is_dataclass(f.type):
            found |= parameters(f.type, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = f
    return found


PARAMETERS = parameters()


def known_keys() -> list[str]:
    """Return every name that a user may type: parameters and aliases."""
    return [*PARAMETERS, *ALIASES]


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return {section: {name: value}}."""
    return dataclasses.asdict(config)


def flatten(tree: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return {"trainer.seed": 0} for {"trainer": {"seed": 0}}; values may be mappings themselves."""
    return {f"{section}.{name}": value for section, values in tree.items() for name, value in values.items()}


def dump(config: Config) -> str:
    """Return the configuration as YAML, which `load_config` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)

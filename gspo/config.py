"""The configuration: dataclass defaults <- YAML file <- command line, strict, with the aliases of the seed and verl.

`load_config(path, overrides)` is the only way in. A key that is not known is an error that names the nearest one; the
resolved tree is written beside the run. `python -m gspo.config` prints every parameter with its default and meaning.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gspo.errors import UserError


def opt(default: Any, help: str, **bounds: float) -> Any:
    """A parameter: its default, its meaning, and optional bounds `ge`, `gt`, `le`, `lt`."""
    metadata = {"help": help, **bounds}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Model:
    path: str | None = opt(None, "Hugging Face folder or hub name; empty: the embedded model")
    precision: Literal["auto", "fp32", "bf16"] = opt(
        "auto", "of matrix products; weights and optimizer stay fp32. auto: bf16 on CUDA, measured once on a CPU"
    )
    gradient_checkpointing: bool = opt(
        False, "recompute activations in the backward pass: less memory, a third more time"
    )
    shard_size: int | None = opt(
        None,
        "ranks that hold one copy of the weights together, e.g. a node's; a multiple of it: copies. empty: all",
        ge=1,
    )
    reshard_after_forward: bool = opt(
        True, "several ranks: a layer is given back after its forward; false: kept until a step's gradient is whole"
    )


@dataclass
class Data:
    train_files: list[str] = opt([], "JSON, JSONL or parquet files; empty: the embedded equations")
    val_files: list[str] = opt([], "held-out prompts for the win rate of each round")
    test_files: list[str] = opt([], "prompts for eval_before and eval_after; empty: val_files")
    train_batch_size: int = opt(256, "prompts a step, over all ranks", ge=1)
    max_prompt_length: int = opt(1024, "tokens, chat template included", ge=1)
    overlong: Literal["error", "drop"] = opt("error", "what to do with a longer prompt")
    shuffle: bool = opt(True, "a new order every epoch")
    spaced: bool = opt(True, "a prompt whose answers were all right is put off for 1, 3, 7, ... epochs")
    system_prompt: str | None = opt(None, "put before every prompt that has no system message")
    chat_template_kwargs: dict[str, Any] = opt({}, "passed to the tokenizer's chat template")


@dataclass
class Rollout:
    n: int = opt(8, "answers a prompt (the scale of self-play)", ge=2)
    temperature: float = opt(0.9, "sampling temperature; training uses the same", gt=0.0)
    top_p: float = opt(1.0, "nucleus sampling; below 1 the trained distribution is not the sampled one", gt=0.0, le=1.0)
    top_k: int = opt(0, "0: off", ge=0)
    min_p: float = opt(0.0, "0: off", ge=0.0, lt=1.0)
    max_new_tokens: int = opt(512, "longest answer", ge=1)
    stop: list[str] = opt([], "an answer also ends where one of these texts is complete, and keeps it")
    max_slots: int | Literal["auto"] = opt(
        256, "answers generated at the same time on a rank, at most; auto: as many as kv_memory_gib holds", ge=1
    )
    kv_memory_gib: float | Literal["auto"] = opt(
        "auto", "memory for their keys and values on a rank; auto: half of what is free", gt=0.0
    )
    tensor_model_parallel_size: int = opt(1, "ranks that share one copy of the sampler's weights", ge=1)
    weights: Literal["auto", "share", "copy"] = opt(
        "auto", "share: sample with the policy's own parameters (one process, fp32); copy; auto: share where possible"
    )


@dataclass
class Reward:
    path: str | None = opt(None, "your file with compute_score; empty: gspo/reward/reward_func.py")
    name: str = opt("compute_score", "the function's name in that file")
    reward_kwargs: dict[str, Any] = opt({}, "further keyword arguments for it")
    workers: int | None = opt(None, "processes that call it, a rank; empty: the rank's share of the cores", ge=1)
    timeout_s: float = opt(10.0, "a call that takes longer is ended", gt=0.0)
    on_error: Literal["zero", "skip_group", "stop"] = opt(
        "zero", "what a response scores when the call raises, hangs or returns no score"
    )
    memory_gib: float = opt(4.0, "memory of one of its processes; 0: no limit", ge=0.0)
    concurrency: int = opt(16, "calls at the same time in one process, for async functions", ge=1)
    check_rows: int = opt(16, "training rows whose gold answer it must score above a wrong one; 0: no check", ge=0)


@dataclass
class Objective:
    algorithm: Literal["gspo", "rloo", "grpo", "dr_grpo", "online_dpo", "spin"] = opt(
        "gspo", "entry of the table in gspo/algorithm/objective.py"
    )
    preference_beta: float = opt(0.1, "temperature of the preference loss", gt=0.0)
    margin: float = opt(0.1, "responses pair when their rewards differ by more than this", ge=0.0, lt=1.0)
    anchor: Literal["none", "opponent", "initial", "old"] = opt(
        "opponent", "log-probs are measured from this model's; none: the literal formula"
    )
    after_fork: float = opt(
        0.3, "weight of the tokens behind the one at which two answers part; 1: DPO's whole answers", ge=0.0, le=1.0
    )
    length_norm: Literal["sum", "mean"] = opt("sum", "whole-response log-prob, or per token")
    pair_weight: Literal["one", "gap"] = opt("one", "weight of a pair: 1, or its reward gap")
    normalizer: Literal["constant", "batch", "group", "sqrt"] = opt(
        "constant", "what a group's pair losses are divided by"
    )
    use_ranking_loss: bool = opt(True, "add the ranking (Plackett-Luce) term")
    ranking_coef: float = opt(0.1, "its weight", ge=0.0)
    kl_coef: float = opt(1e-3, "weight of the KL term to the reference", ge=0.0)
    nll_coef: float = opt(0.0, "weight of the winners' negative log-likelihood", ge=0.0)
    clip_low: float = opt(0.2, "off-policy updates: ratio clipped below 1 - this", gt=0.0, lt=1.0)
    clip_high: float = opt(0.28, "off-policy updates: ratio clipped above 1 + this", gt=0.0)
    max_mismatch_weight: float = opt(2.0, "off-policy updates: bound on p_train / p_sampler", ge=1.0)


@dataclass
class SelfPlay:
    rounds: int = opt(3, "rounds; at each start the opponent becomes a copy of the policy", ge=1)


@dataclass
class Reference:
    param_offload: bool = opt(True, "keep the opponent / reference in CPU memory between uses")
    refresh: Literal["round", "never"] = opt("round", "KL reference: the opponent of the round, or the initial model")


@dataclass
class Optim:
    learning_rate: float = opt(1e-6, "peak AdamW step size", gt=0.0)
    schedule: Literal["constant", "linear", "cosine"] = opt("constant", "after warm-up")
    min_lr_ratio: float = opt(0.0, "end of linear / cosine, as a share of the peak", ge=0.0, le=1.0)
    warmup_steps: int = opt(0, "linear warm-up", ge=0)
    weight_decay: float = opt(0.0, "on matrices; never on norms and biases", ge=0.0)
    beta1: float = opt(0.9, "AdamW", ge=0.0, lt=1.0)
    beta2: float = opt(0.99, "AdamW", ge=0.0, lt=1.0)
    grad_clip: float = opt(1.0, "global gradient norm is cut to this", gt=0.0)
    epochs_per_rollout: int = opt(1, "passes over a rollout", ge=1)
    minibatches: int = opt(1, "optimizer steps a pass", ge=1)
    micro_batch_tokens: int = opt(
        16384,
        "tokens in one forward / backward on a rank, a group's prompt counted once; does not change the gradient",
        ge=1,
    )
    micro_batch_responses: int | None = opt(None, "a further limit, in responses", ge=1)
    gradient_reduction: Literal["micro_batch", "step"] = opt(
        "micro_batch", "several ranks: when gradients are summed; step: less to send, each rank holds them whole"
    )
    offload: bool = opt(False, "weights, gradients and moments in CPU memory, where the step is taken; slower")


@dataclass
class Eval:
    n: int = opt(8, "samples a prompt", ge=1)
    prompts: int | None = opt(None, "use only the first so many prompts of test_files", ge=1)
    round_prompts: int = opt(64, "held-out prompts for the win rate of each round; 0: none", ge=0)
    freq: int = opt(0, "held-out prompts also every so many steps, not only when a round ends; 0: no", ge=0)
    before_and_after: bool = opt(True, "evaluate on test_files before and after training")


@dataclass
class Health:
    gap_std_max: float = opt(0.7, "warn above: spread of the implicit reward gaps; the sigmoid saturates", gt=0.0)
    gap_std_alarm: float = opt(1.5, "alarm above", gt=0.0)
    winner_logprob_drop_max: float = opt(
        0.2, "warn above: nats a token that the chosen answers have lost since the round began", gt=0.0
    )
    length_ratio_max: float = opt(1.5, "warn above: mean length of the answers / at first", gt=0.0)
    cutoff_max: float = opt(0.1, "warn above: share of answers cut off", gt=0.0)
    kl_divergence_min: float = opt(0.001, "warn below", ge=0.0)
    kl_divergence_max: float = opt(0.1, "warn above", gt=0.0)
    kl_divergence_alarm: float = opt(0.5, "alarm above", gt=0.0)
    paired_groups_min: float = opt(0.2, "warn below: share of groups with a pair", ge=0.0, le=1.0)
    preference_accuracy_min: float = opt(0.6, "warn below", ge=0.0, le=1.0)
    diverging_rounds_max: int = opt(
        1, "warn above: rounds in a row with training reward up and held-out accuracy down", ge=0
    )
    mismatch_max: float = opt(0.02, "warn above: mean |sampler - trainer| log-prob", gt=0.0)
    mismatch_alarm: float = opt(0.1, "alarm above", gt=0.0)
    entropy_ratio_min: float = opt(0.3, "warn below: entropy / at first", ge=0.0)
    risen_reward: float = opt(0.2, "mean reward above that at first from which misordered pairs are no illness", ge=0.0)
    solved_reward: float = opt(0.9, "mean reward from which low entropy is no illness", ge=0.0)
    skipped_updates_max: int = opt(0, "warn above: updates of a step skipped as not finite", ge=0)
    reward_faults_max: float = opt(0.05, "warn above: share of reward calls that failed", ge=0.0, le=1.0)
    patience: int = opt(5, "steps in a row outside the range before the warning", ge=1)
    alarm_patience: int = opt(2, "steps in a row beyond an alarm's limit before the alarm", ge=1)
    on_alarm: Literal["warn", "stop"] = opt("warn", "stop: an alarm ends the run, with a checkpoint")
    max_bad_steps: int = opt(5, "non-finite updates in a row before the run stops", ge=1)


@dataclass
class Trainer:
    total_epochs: int = opt(15, "passes over the training prompts", ge=1)
    max_steps: int | None = opt(None, "stop after so many steps, whatever the epochs", ge=1)
    save_freq: int = opt(50, "checkpoint every so many steps and at the end; 0: only at the end", ge=0)
    keep_last: int = opt(3, "checkpoints kept; 0: all", ge=0)
    keep_best: bool = opt(True, "one more is saved and kept when held-out accuracy is the best so far: `best`")
    async_save: bool = opt(True, "write checkpoints while training goes on, from a copy in CPU memory")
    output_dir: str = opt("outputs", "runs are written below it")
    run_name: str | None = opt(None, "folder of the run; empty: the name of the config file")
    seed: int = opt(0, "of sampling and data order", ge=0)
    resume: str = opt(
        "auto", "auto: go on where the run stopped; never: start anew; or a checkpoint folder for a run to begin from"
    )
    sample_rows: int = opt(8, "groups a step written to samples.jsonl", ge=0)
    n_gpus: int | None = opt(None, "processes a node; checked against torchrun's", ge=1)
    nnodes: int | None = opt(None, "nodes; checked against torchrun's", ge=1)


@dataclass
class Config:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    rollout: Rollout = field(default_factory=Rollout)
    reward: Reward = field(default_factory=Reward)
    objective: Objective = field(default_factory=Objective)
    selfplay: SelfPlay = field(default_factory=SelfPlay)
    reference: Reference = field(default_factory=Reference)
    optim: Optim = field(default_factory=Optim)
    eval: Eval = field(default_factory=Eval)
    health: Health = field(default_factory=Health)
    trainer: Trainer = field(default_factory=Trainer)


# What users of the seed and of verl type -> our key.
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
    "trainer.test_freq": "eval.freq",
}
VALUE_ALIASES = {
    ("trainer.resume", "disable"): "never",
    ("rollout.top_k", -1): 0,
    ("eval.freq", -1): 0,
    ("model.shard_size", -1): None,
}


def parameters(node: Any = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every parameter of the tree: dotted key -> its dataclass field."""
    found = {}
    for f in dataclasses.fields(node):
        if dataclasses.is_dataclass(f.type):
            found |= parameters(f.type, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = f
    return found


PARAMETERS = parameters()


def known_keys() -> list[str]:
    return [*PARAMETERS, *ALIASES]


def canonical(key: str, place: str) -> str | None:
    """Our dotted key for what was typed; None for an alias that is accepted and has no effect."""
    key = key.lstrip("+")
    if key in ALIASES:
        return ALIASES[key]
    if key in PARAMETERS:
        return key
    near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.0)
    raise UserError(f"{place}: unknown key {key!r}; did you mean {near[0]!r}? `python -m gspo.config` lists every key.")


def _type_name(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(kind) or (kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", ""))


def coerce(value: Any, kind: Any, key: str, place: str, also: tuple[Any, ...] = ()) -> Any:
    """`value` as the parameter's type; UserError, which names what is `also` allowed, when it is not one."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # only `X | None` and `X | Literal[...]` occur
        if value is None and args[1] is types.NoneType or value in typing.get_args(args[1]):
            return value
        return coerce(value, args[0], key, place, also=typing.get_args(args[1]))
    if origin is Literal and value in args:
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            if float(value) == int(float(value)):
                return value if isinstance(value, int) else int(float(value))
        except (ValueError, OverflowError):
            pass
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-6 as a string
            if math.isfinite(float(value)):
                return float(value)
        except (ValueError, OverflowError):
            pass
    if kind is str and isinstance(value, str | int | float):
        return str(value)
    if origin is list:
        items = [] if value is None else value if isinstance(value, list) else [value]
        return [coerce(item, args[0], key, place) for item in items]
    if origin is dict and isinstance(value, dict):
        return value
    expected = f"one of {', '.join(map(str, args))}" if origin is Literal else _type_name(kind)
    expected = " or ".join([expected, *map(str, also)])
    raise UserError(f"{place}: {key} = {value!r} is not {expected}.")


def _check_bounds(value: Any, f: dataclasses.Field, key: str, place: str) -> None:
    if value is None or not isinstance(value, int | float):
        return
    tests = {
        "ge": (">=", value.__ge__),
        "gt": (">", value.__gt__),
        "le": ("<=", value.__le__),
        "lt": ("<", value.__lt__),
    }
    for name, (sign, holds) in tests.items():
        bound = f.metadata.get(name)
        if bound is not None and holds(type(value)(bound)) is not True:
            cure = " One answer a prompt makes no pair: nothing to learn from." if key == "rollout.n" else ""
            raise UserError(f"{place}: {key} = {value} is out of range, it must be {sign} {bound}.{cure}")


def set_value(config: Config, typed: str, value: Any, place: str) -> None:
    """Set one parameter, by our key or an alias, after checking type and range."""
    key = canonical(typed, place)
    if key is None:
        return
    if isinstance(value, str | int):
        value = VALUE_ALIASES.get((key, value), value)
    f = PARAMETERS[key]
    value = coerce(value, f.type, key, place)
    _check_bounds(value, f, key, place)
    section, name = key.split(".")
    setattr(getattr(config, section), name, value)


def _leaves(tree: dict, place: str, prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        is_leaf = key in PARAMETERS or key in ALIASES
        if isinstance(value, dict) and not is_leaf:
            found += _leaves(value, place, f"{key}.")
        elif value is None and not is_leaf and any(k.startswith(f"{key}.") for k in known_keys()):
            continue  # a section with nothing in it
        else:
            found.append((key, value))
    return found


def read_yaml(path: Path) -> dict:
    """A YAML mapping; UserError when the file is missing or is something else."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(
            f"--config {path}: {e.strerror or e}. Presets: configs/quick.yaml, standard, high_quality."
        ) from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(tree, dict | None):
        raise UserError(f"--config {path} holds a {type(tree).__name__}, not a mapping of sections.")
    return tree or {}


def _typed(key: str, text: str) -> Any:
    """What was typed after the equals sign, read as YAML; what is to be a text stays as it is."""
    target = canonical(key, "command line")
    if not text or text == "null":
        return None
    if target and PARAMETERS[target].type in (str, str | None):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Defaults <- YAML <- `a.b=c` overrides. Raises UserError."""
    config = Config()
    if path is not None:
        for key, value in _leaves(read_yaml(Path(path)), str(path)):
            set_value(config, key, value, str(path))
        config.trainer.run_name = config.trainer.run_name or Path(path).stem
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"command line: {item!r} is not of the form section.key=value.")
        set_value(config, key, _typed(key, text), "command line")
    config.trainer.run_name = config.trainer.run_name or "run"
    if Path(config.trainer.run_name).name != config.trainer.run_name or config.trainer.run_name in (
        "checkpoints",
        "..",
    ):
        raise UserError(
            f"trainer.run_name = {config.trainer.run_name!r} must be a plain folder name, not 'checkpoints'."
        )
    return config


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    return dataclasses.asdict(config)


def flatten(tree: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{"trainer": {"seed": 0}} -> {"trainer.seed": 0}; values may be mappings themselves."""
    return {f"{section}.{name}": value for section, values in tree.items() for name, value in values.items()}


def dump(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


if __name__ == "__main__":
    defaults = flatten(to_dict(Config()))
    print("| parameter | default | meaning |\n|---|---|---|")
    for key, f in PARAMETERS.items():
        choices = typing.get_args(f.type) if typing.get_origin(f.type) is Literal else ()
        note = f" ({' / '.join(choices)})" if choices else ""
        value = "" if defaults[key] in (None, [], {}) else f"`{defaults[key]}`"
        print(f"| `{key}` | {value} | {f.metadata['help']}{note} |")

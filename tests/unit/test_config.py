"""Configuration: defaults, precedence, aliases, and mistakes that are reported with value, place and cure."""

import re

import pytest
import yaml
from repository import ROOT

from gspo.config import Objective, dump, flatten, to_dict
from gspo.config_aliases import ALIASES
from gspo.errors import UserError
from gspo.read_config import load_config


@pytest.fixture()
def write(tmp_path):
    def write(text, name="my.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def value_of(cfg, key):
    return flatten(to_dict(cfg))[key]


def nested(key, value):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


# ---- defaults and presets ----


@pytest.mark.parametrize("path", [None, ROOT / "configs/standard.yaml"], ids=["dataclasses", "standard"])
def test_defaults_are_those_of_the_original_description(path):
    cfg = load_config(path)
    assert (cfg.rollout.n, cfg.selfplay.rounds) == (8, 3)
    assert (cfg.objective.preference_beta, cfg.objective.margin, cfg.objective.use_ranking_loss) == (0.1, 0.1, True)
    assert (cfg.data.train_batch_size, cfg.optim.learning_rate, cfg.trainer.total_epochs) == (256, 1e-6, 15)
    assert (cfg.rollout.temperature, cfg.trainer.output_dir) == (0.9, "outputs")


@pytest.mark.parametrize(("name", "n", "rounds"), [("quick", 4, 2), ("standard", 8, 3), ("high_quality", 12, 5)])
def test_presets(name, n, rounds):
    cfg = load_config(ROOT / f"configs/{name}.yaml")
    assert (cfg.rollout.n, cfg.selfplay.rounds, cfg.trainer.run_name) == (n, rounds, name)


def test_defaults_are_not_shared_between_configs():
    load_config().data.train_files.append("x.json")
    load_config().reward.reward_kwargs["a"] = 1
    assert load_config().data.train_files == [] and load_config().reward.reward_kwargs == {}


def test_a_preset_may_be_named_without_its_folder(tmp_path, monkeypatch):
    by_path = load_config(ROOT / "configs/quick.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config("quick") == by_path
    (tmp_path / "standard").mkdir()
    assert load_config("standard") == load_config(ROOT / "configs/standard.yaml"), "a folder is no configuration"
    (tmp_path / "quick").write_text("rollout: {n: 3}")
    assert load_config("quick").rollout.n == 3, "a file of that name goes first"
    with pytest.raises(UserError, match="--config quik: No such file"):
        load_config("quik")
    with pytest.raises(UserError, match="--config configs/quick: No such file"):
        load_config("configs/quick")


# ---- one setting for the original description's algorithm ----


def test_the_seed_preset_is_the_original_description():
    cfg = load_config("seed")
    assert (cfg.rollout.n, cfg.selfplay.rounds, cfg.rollout.temperature, cfg.trainer.total_epochs) == (8, 3, 0.9, 15)
    assert (cfg.data.train_batch_size, cfg.optim.learning_rate) == (256, 1e-6)
    o = cfg.objective
    assert (o.preference_beta, o.margin, o.use_ranking_loss) == (0.1, 0.1, True)
    assert (o.form, o.algorithm, o.anchor, o.after_fork, o.length_norm) == ("seed", "gspo", "none", 1.0, "sum")
    assert (o.pair_weight, o.normalizer, o.nll_coef) == ("one", "batch", 0.0)
    assert (cfg.data.shuffle, cfg.data.spaced) == (True, False)
    assert (cfg.optim.epochs_per_rollout, cfg.optim.minibatches) == (1, 1), "E is over the batch, in one step"


def test_the_form_is_one_setting_and_undoes_nothing_else(write):
    expected = load_config("seed")
    expected.trainer.run_name = "run"
    assert load_config(None, ["objective.form=seed"]) == expected
    assert load_config("seed", ["objective.form=default"]).objective == Objective()
    assert load_config("seed", ["objective.kl_coef=0.02", "margin=0.2"]).objective.kl_coef == 0.02
    assert load_config(write(dump(expected))) == expected, "what is written beside a run loads again"


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("algorithm=rloo", "objective.algorithm = 'gspo'"),
        ("objective.anchor=opponent", "objective.anchor = 'none'"),
        ("objective.after_fork=0.3", "objective.after_fork = 1.0"),
        ("objective.length_norm=mean", "objective.length_norm = 'sum'"),
        ("objective.pair_weight=gap", "objective.pair_weight = 'one'"),
        ("objective.normalizer=constant", "objective.normalizer = 'batch'"),
        ("objective.nll_coef=0.1", "objective.nll_coef = 0.0"),
        ("data.shuffle=false", "data.shuffle = True"),
        ("data.spaced=true", "data.spaced = False"),
    ],
)
def test_a_setting_that_contradicts_the_form_is_an_error(write, setting, meant):
    key, _, value = meant.partition(" = ")
    said = rf"{re.escape(key)} = \S+ contradicts objective.form = seed, which stands for {re.escape(meant)}"
    with pytest.raises(UserError, match=f"command line: {said}"):
        load_config("seed", [setting])
    file = write(dump(load_config(None, [setting])))
    with pytest.raises(UserError, match=f"{re.escape(str(file))}: "):
        load_config(file, ["objective.form=seed"])
    same = value.strip("'").lower()
    assert load_config("seed", [f"{key}={same}"]) == load_config("seed"), "to say it again is no contradiction"


# ---- precedence and types ----


def test_yaml_beats_defaults_and_overrides_beat_yaml_the_last_one_winning(write):
    path = write("rollout: {n: 6, temperature: 0.7}\nobjective: {margin: 0.3}\n")
    cfg = load_config(path, ["rollout.n=5", "objective.margin=0.2", "rollout.n=7"])
    assert (cfg.rollout.n, cfg.rollout.temperature, cfg.objective.margin, cfg.selfplay.rounds) == (7, 0.7, 0.2, 3)


@pytest.mark.parametrize("how", ["yaml", "override"])
@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.learning_rate", "1e-6", 1e-6),  # YAML 1.1 reads this as a text
        ("optim.learning_rate", "3.0e-4", 3e-4),
        ("optim.learning_rate", "1", 1.0),
        ("rollout.n", "1e1", 10),
        ("rollout.n", "'12'", 12),
        ("rollout.max_slots", "auto", "auto"),
        ("rollout.max_slots", "64", 64),
        ("rollout.kv_memory_gib", "1.5", 1.5),
        ("rollout.stop", "['\\n\\n', </answer>]", ["\\n\\n", "</answer>"]),
        ("rollout.top_k", "-1", 0),  # verl's "off"
        ("objective.use_ranking_loss", "false", False),
        ("trainer.max_steps", "null", None),
        ("model.path", "7", "7"),
        ("data.train_files", "a.json", ["a.json"]),
        ("data.train_files", "[a.json, b.jsonl]", ["a.json", "b.jsonl"]),
        ("data.train_files", "null", []),
        ("reward.reward_kwargs", "{bonus: 0.5}", {"bonus": 0.5}),
        ("trainer.seed", "9007199254740993", 2**53 + 1),  # no way through a float
    ],
)
def test_values_become_the_parameters_type(write, how, key, text, value):
    if how == "yaml":
        cfg = load_config(write("\n".join("  " * i + f"{k}:" for i, k in enumerate(key.split("."))) + f" {text}\n"))
    else:
        cfg = load_config(None, [f"{key}={text}"])
    got = value_of(cfg, ALIASES.get(key, key))
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text", ["007", "1.10", "1_000", "12:30", "2024-01-01", "on", "a: b", "[x]", "be brief # not"])
def test_a_text_on_the_command_line_is_taken_as_typed(text):
    assert load_config(None, [f"data.system_prompt={text}"]).data.system_prompt == text


def test_an_equals_sign_may_stand_in_a_value():
    assert load_config(None, ["model.path=runs/lr=3/best"]).model.path == "runs/lr=3/best"


def test_an_empty_file_and_an_empty_section_change_nothing(write):
    expected = to_dict(load_config(None, ["trainer.run_name=my"]))
    assert to_dict(load_config(write(""))) == to_dict(load_config(write("rollout:\noptim: {}\n"))) == expected


@pytest.mark.parametrize(("path", "overrides", "name"), [(None, [], "run"), ("my.yaml", [], "my")])
def test_a_run_is_named_after_its_file_unless_a_name_is_given(write, path, overrides, name):
    path = path and write("", path)
    assert load_config(path, overrides).trainer.run_name == name
    assert load_config(path, [*overrides, "trainer.run_name=other"]).trainer.run_name == "other"


# ---- aliases ----

TYPED = {  # names of the original description and of verl: (text, our section, our name, value)
    "model_path": ("some/model", "model", "path", "some/model"),
    "rollout_n": ("10", "rollout", "n", 10),
    "rollout_temperature": ("0.7", "rollout", "temperature", 0.7),
    "self_play_rounds": ("5", "selfplay", "rounds", 5),
    "preference_beta": ("0.2", "objective", "preference_beta", 0.2),
    "margin": ("0.15", "objective", "margin", 0.15),
    "use_ranking_loss": ("false", "objective", "use_ranking_loss", False),
    "train_batch_size": ("64", "data", "train_batch_size", 64),
    "learning_rate": ("5e-7", "optim", "learning_rate", 5e-7),
    "total_epochs": ("2", "trainer", "total_epochs", 2),
    "reward_func": ("./my_reward.py", "reward", "path", "./my_reward.py"),
    "algorithm": ("gspo", "objective", "algorithm", "gspo"),
    "n_gpus": ("8", "trainer", "n_gpus", 8),
    "run_name": ("other", "trainer", "run_name", "other"),
    "output_dir": ("elsewhere", "trainer", "output_dir", "elsewhere"),
    "actor_rollout_ref.model.path": ("some/model", "model", "path", "some/model"),
    "actor_rollout_ref.rollout.n": ("10", "rollout", "n", 10),
    "actor_rollout_ref.rollout.temperature": ("0.7", "rollout", "temperature", 0.7),
    "actor_rollout_ref.rollout.top_p": ("0.95", "rollout", "top_p", 0.95),
    "actor_rollout_ref.rollout.top_k": ("50", "rollout", "top_k", 50),
    "actor_rollout_ref.rollout.tensor_model_parallel_size": ("4", "rollout", "tensor_model_parallel_size", 4),
    "actor_rollout_ref.actor.optim.lr": ("1e-5", "optim", "learning_rate", 1e-5),
    "actor_rollout_ref.actor.grad_clip": ("0.5", "optim", "grad_clip", 0.5),
    "actor_rollout_ref.actor.kl_loss_coef": ("0.01", "objective", "kl_coef", 0.01),
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": ("16", "optim", "micro_batch_responses", 16),
    "actor_rollout_ref.actor.fsdp_config.fsdp_size": ("4", "model", "shard_size", 4),
    "actor_rollout_ref.actor.fsdp_config.reshard_after_forward": ("false", "model", "reshard_after_forward", False),
    "actor_rollout_ref.actor.fsdp_config.offload_policy": ("true", "optim", "offload", True),
    "actor_rollout_ref.ref.fsdp_config.param_offload": ("false", "reference", "param_offload", False),
    "data.max_response_length": ("99", "rollout", "max_new_tokens", 99),
    "custom_reward_function.path": ("r.py", "reward", "path", "r.py"),
    "custom_reward_function.name": ("judge", "reward", "name", "judge"),
    "custom_reward_function.reward_kwargs": ("{a: 1}", "reward", "reward_kwargs", {"a": 1}),
    "trainer.n_gpus_per_node": ("8", "trainer", "n_gpus", 8),
    "trainer.resume_mode": ("disable", "trainer", "resume", "never"),
    "trainer.default_local_dir": ("elsewhere", "trainer", "output_dir", "elsewhere"),
    "trainer.test_freq": ("5", "eval", "freq", 5),
    "trainer.total_training_steps": ("40", "trainer", "max_steps", 40),
    "data.apply_chat_template_kwargs": ("{a: 1}", "data", "chat_template_kwargs", {"a": 1}),
    "actor_rollout_ref.actor.optim.lr_warmup_steps": ("7", "optim", "warmup_steps", 7),
    "actor_rollout_ref.actor.optim.weight_decay": ("0.1", "optim", "weight_decay", 0.1),
    "actor_rollout_ref.actor.ppo_epochs": ("2", "optim", "epochs_per_rollout", 2),
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": ("16384", "optim", "micro_batch_tokens", 16384),
    "actor_rollout_ref.actor.clip_ratio_low": ("0.1", "objective", "clip_low", 0.1),
    "actor_rollout_ref.actor.clip_ratio_high": ("0.3", "objective", "clip_high", 0.3),
    "actor_rollout_ref.model.enable_gradient_checkpointing": ("true", "model", "gradient_checkpointing", True),
    "actor_rollout_ref.rollout.max_num_seqs": ("128", "rollout", "max_slots", 128),
    "actor_rollout_ref.rollout.val_kwargs.n": ("4", "eval", "n", 4),
    "trainer.max_actor_ckpt_to_keep": ("2", "trainer", "keep_last", 2),
    "trainer.val_before_train": ("false", "eval", "before_and_after", False),
    "trainer.resume_from_path": (
        "runs/a/checkpoints/step_000002",
        "trainer",
        "resume",
        "runs/a/checkpoints/step_000002",
    ),
    "critic.optim.lr": ("1e-4", "critic", "learning_rate", 1e-4),
    "critic.optim.lr_warmup_steps": ("7", "critic", "warmup_steps", 7),
    "critic.cliprange_value": ("0.5", "critic", "clip", 0.5),
    "algorithm.gamma": ("0.99", "critic", "gamma", 0.99),
    "algorithm.lam": ("0.9", "critic", "gae_lambda", 0.9),
    "data.val_max_samples": ("16", "eval", "prompts", 16),
    "actor_rollout_ref.actor.optim.min_lr_ratio": ("0.1", "optim", "min_lr_ratio", 0.1),
    "actor_rollout_ref.actor.optim.clip_grad": ("0.5", "optim", "grad_clip", 0.5),
    "reward.custom_reward_function.path": ("r.py", "reward", "path", "r.py"),
    "reward.custom_reward_function.name": ("judge", "reward", "name", "judge"),
    "reward.custom_reward_function.reward_kwargs": ("{a: 1}", "reward", "reward_kwargs", {"a": 1}),
    "reward.num_workers": ("3", "reward", "workers", 3),
    "reward_model.num_workers": ("3", "reward", "workers", 3),
    # TRL's
    "chat_template_kwargs": ("{a: 1}", "data", "chat_template_kwargs", {"a": 1}),
    "shuffle_dataset": ("false", "data", "shuffle", False),
    "tf32": ("true", "model", "tf32", True),
    "loss_type": ("dr_grpo", "objective", "algorithm", "dr_grpo"),
    "model_name_or_path": ("some/model", "model", "path", "some/model"),
    "num_generations": ("16", "rollout", "n", 16),
    "max_completion_length": ("99", "rollout", "max_new_tokens", 99),
    "max_prompt_length": ("77", "data", "max_prompt_length", 77),
    "temperature": ("0.7", "rollout", "temperature", 0.7),
    "top_p": ("0.95", "rollout", "top_p", 0.95),
    "top_k": ("50", "rollout", "top_k", 50),
    "min_p": ("0.1", "rollout", "min_p", 0.1),
    "num_iterations": ("2", "optim", "epochs_per_rollout", 2),
    "epsilon_high": ("0.3", "objective", "clip_high", 0.3),
    "gradient_checkpointing": ("true", "model", "gradient_checkpointing", True),
    "lr": ("5e-7", "optim", "learning_rate", 5e-7),
    "optim.lr": ("5e-7", "optim", "learning_rate", 5e-7),
    "warmup_steps": ("7", "optim", "warmup_steps", 7),
    "weight_decay": ("0.1", "optim", "weight_decay", 0.1),
    "adam_beta1": ("0.8", "optim", "beta1", 0.8),
    "adam_beta2": ("0.98", "optim", "beta2", 0.98),
    "max_grad_norm": ("0.5", "optim", "grad_clip", 0.5),
    "num_train_epochs": ("2", "trainer", "total_epochs", 2),
    "max_steps": ("40", "trainer", "max_steps", 40),
    "save_steps": ("20", "trainer", "save_freq", 20),
    "save_total_limit": ("2", "trainer", "keep_last", 2),
    "eval_steps": ("5", "eval", "freq", 5),
    "num_generations_eval": ("4", "eval", "n", 4),
    "report_to": ("[wandb]", "trainer", "trackers", ["wandb"]),
    "resume_from_checkpoint": ("runs/a/checkpoints/step_000002", "trainer", "resume", "runs/a/checkpoints/step_000002"),
    "seed": ("3", "trainer", "seed", 3),
    # verl's names that are ours too
    "data.train_files": ("a.parquet", "data", "train_files", ["a.parquet"]),
    "data.val_files": ("a.parquet", "data", "val_files", ["a.parquet"]),
    "data.train_batch_size": ("64", "data", "train_batch_size", 64),
    "data.max_prompt_length": ("77", "data", "max_prompt_length", 77),
    "trainer.total_epochs": ("2", "trainer", "total_epochs", 2),
    "trainer.nnodes": ("2", "trainer", "nnodes", 2),
    "trainer.save_freq": ("20", "trainer", "save_freq", 20),
    "trainer.logger": ("[console, wandb]", "trainer", "trackers", ["console", "wandb"]),
    "trainer.experiment_name": ("mine", "trainer", "run_name", "mine"),
}


def test_no_alias_is_left_untested():
    assert set(ALIASES) <= set(TYPED)


@pytest.mark.parametrize("how", ["yaml", "override", "+override"])
@pytest.mark.parametrize("key", TYPED)
def test_aliases_set_our_parameter_and_no_other(write, key, how):
    text, section, name, value = TYPED[key]
    expected = flatten(to_dict(load_config(None, ["trainer.run_name=my"])))
    if section:
        expected[f"{section}.{name}"] = value
    if how == "yaml":
        cfg = load_config(write(yaml.safe_dump(nested(key, yaml.safe_load(text)))))
    else:
        cfg = load_config(None, ["trainer.run_name=my", f"{how[:-8]}{key}={text}"])
    assert flatten(to_dict(cfg)) == expected


@pytest.mark.parametrize("offload", [True, False])
def test_the_original_yaml_for_offloading_the_reference(write, offload):
    text = f"actor_rollout_ref:\n  ref:\n    fsdp_config:\n      param_offload: {str(offload).lower()}\n"
    assert load_config(write(text), []).reference.param_offload is offload


# ---- mistakes ----


MISTAKES = {  # override: what the message must say
    "rollout.m=4": ["'rollout.m'", "did you mean 'rollout.n'"],
    "optim.learning_rat=1": ["'optim.learning_rat'", "'optim.learning_rate'"],
    "actor_rollout_ref.actor.optim.lrr=1": ["'actor_rollout_ref.actor.optim.lr'"],
    "self_play_round=1": ["'self_play_rounds'"],
    "rollout=4": ["'rollout' is a section; name a parameter in it: rollout.n, "],
    "n=4": ["unknown key 'n'", "did you mean 'rollout.n' or 'eval.n'"],
    "freq=4": ["did you mean 'eval.freq'"],
    "zzz.qqq=1": ["unknown key 'zzz.qqq'. `python"],  # no guess that would lead astray
    "data.train_batch_sizes=1": ["'data.train_batch_size'"],
    "rollout.n=abc": ["rollout.n = 'abc'", "a whole number."],
    "rollout.n=2.5": ["rollout.n = 2.5", "a whole number."],
    "rollout.n=true": ["rollout.n = True", "a whole number."],
    "rollout.n=": ["'rollout.n='", "rollout.n no value", "rollout.n=null"],
    "rollout.n=inf": ["rollout.n = 'inf'", "a whole number."],
    "rollout_n=[4]": ["rollout.n = [4]", "a whole number."],
    "objective.use_ranking_loss=2": ["objective.use_ranking_loss = 2", "true or false."],
    "rollout.temperature=warm": ["rollout.temperature = 'warm'", "a number."],
    "rollout.temperature=.nan": ["rollout.temperature = nan", "a number."],
    f"rollout.temperature={10**400}": ["rollout.temperature = 1000", "a number."],
    "optim.learning_rate=inf": ["optim.learning_rate = 'inf'", "a number."],
    "objective.anchor=self": ["objective.anchor = 'self'", "none, opponent, initial, old"],
    "reward.reward_kwargs=3": ["reward.reward_kwargs = 3", "dict"],
    "rollout.max_slots=0": ["rollout.max_slots = 0", ">= 1"],
    "rollout.max_slots=many": ["rollout.max_slots = 'many'", "a whole number or auto"],
    "rollout.kv_memory_gib=0": ["rollout.kv_memory_gib = 0.0", "> 0"],
    "rollout.n=1": ["rollout.n = 1", ">= 2", "makes no pair"],
    "rollout.temperature=0": ["rollout.temperature = 0.0", "> 0"],
    "rollout.top_p=1.01": ["rollout.top_p = 1.01", "<= 1"],
    "rollout.top_k=-2": ["rollout.top_k = -2", ">= 0"],
    "objective.margin=-1": ["objective.margin = -1.0", ">= 0"],
    "objective.preference_beta=-0.1": ["objective.preference_beta = -0.1", "> 0"],
    "trainer.seed=-1": ["trainer.seed = -1", ">= 0"],
    "optim.micro_batch_responses=0": ["optim.micro_batch_responses = 0", ">= 1"],
}


@pytest.mark.parametrize("override", MISTAKES, ids=lambda text: text[:40])
def test_mistakes_on_the_command_line(override):
    with pytest.raises(UserError) as e:
        load_config(None, [override])
    assert str(e.value).startswith("command line: ")
    assert [part for part in MISTAKES[override] if part not in str(e.value)] == []


@pytest.mark.parametrize(
    "override", [o for o in MISTAKES if "inf" not in o and not o.endswith("=")], ids=lambda t: t[:40]
)
def test_the_same_mistakes_in_a_file(write, override):
    key, _, text = override.partition("=")
    path = write(yaml.safe_dump(nested(key, yaml.safe_load(text))))
    with pytest.raises(UserError) as e:
        load_config(path)
    assert str(e.value).startswith(f"{path}: ")
    assert [part for part in MISTAKES[override] if part not in str(e.value)] == []


@pytest.mark.parametrize("override", ["rollout.n", "4", ""])
def test_an_override_without_an_equals_sign(override):
    with pytest.raises(UserError, match=re.escape(f"{override!r} is not of the form section.key=value")):
        load_config(None, [override])


@pytest.mark.parametrize("name", ["a/b", "..", "../x", ".", "checkpoints"])
def test_a_run_name_must_be_a_plain_folder(name):
    with pytest.raises(UserError, match=re.escape(f"trainer.run_name = {name!r}")):
        load_config(None, [f"trainer.run_name={name}"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"rollout: {n: 4", "is not valid YAML"),
        (b"rollout:\n\tn: 4\n", "is not valid YAML"),
        (b"a\x00b", "is not valid YAML"),
        ("rollout: {n: 4}  # größer".encode("latin-1"), "is not valid YAML"),
        (b"- rollout.n=4\n", "holds a list, not a mapping"),
        (b"rollout.n=4\n", "holds a str, not a mapping"),
    ],
)
def test_a_file_that_is_not_a_configuration(write, content, said):
    path = write(content)
    with pytest.raises(UserError) as e:
        load_config(path)
    assert str(e.value).startswith(f"--config {path} {said}") and "\n" not in str(e.value)


# ---- what is written beside a run ----


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "data.train_files=[a.json,数据.jsonl]",
            "data.system_prompt=请一步一步思考。",
            "reward.reward_kwargs={bonus: 0.25, names: [x, 'no']}",
            "optim.learning_rate=1e-7",
            "optim.micro_batch_responses=3",
            "objective.anchor=none",
            "trainer.run_name=null-1",
            "rollout.top_p=0.9",
        ],
    ],
    ids=["defaults", "changed"],
)
def test_a_dumped_configuration_loads_again(write, overrides):
    cfg = load_config(None, overrides)
    assert load_config(write(dump(cfg))) == cfg

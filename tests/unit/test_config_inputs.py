"""Configuration as it comes in real life: keys given twice, empty arguments, dates, home folders, keys in mappings."""

import json
import re
from pathlib import Path

import pytest
import yaml

from gspo.config import flatten, to_dict
from gspo.errors import UserError
from gspo.read_config import load_config


@pytest.fixture()
def read(tmp_path):
    """Read a configuration from the text of a file, and from the command line."""

    def read(text, *overrides, name="my.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return load_config(tmp_path / name, overrides)

    return read


def value_of(cfg, key):
    return flatten(to_dict(cfg))[key]


# ---- a key that is given twice ----

TWICE = {
    "sections": (
        "optim: {learning_rate: 3e-4}\nrollout: {n: 4}\noptim: {warmup_steps: 2}\n",
        "'optim'",
        "lines 1 and 3",
    ),
    "parameters": ("rollout:\n  n: 4\n  temperature: 1.0\n  n: 8\n", "'n'", "lines 2 and 4"),
    "in braces": ("rollout: {n: 4, n: 8}\n", "'n'", "lines 1 and 1"),
    "quoted": ("trainer:\n  seed: 1\n  'seed': 2\n", "'seed'", "lines 2 and 3"),
    "in a mapping": ("reward:\n  reward_kwargs: {a: {k: 1, k: 2}}\n", "'k'", "lines 2 and 2"),
    "the same value": ("trainer: {seed: 1, seed: 1}\n", "'seed'", "twice"),
    "a number as key": ("reward: {reward_kwargs: {1: a, 1: b}}\n", "'1'", "twice"),
    "dotted": ("trainer: {seed: 1}\ntrainer.seed: 2\n", "trainer.seed", "set the same parameter"),
    "an alias": ("learning_rate: 1e-5\noptim: {learning_rate: 1e-4}\n", "learning_rate and", "same parameter"),
    "verl's name": ("data: {max_response_length: 9}\nrollout: {max_new_tokens: 8}\n", "rollout.max_new_tokens", "same"),
    "inside a mapping": ("reward: {reward_kwargs: {k: 1}, reward_kwargs.k: 2}\n", "reward.reward_kwargs.k", "same"),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_key_given_twice_is_an_error_that_says_where(read, name):
    text, *said = TWICE[name]
    with pytest.raises(UserError) as e:
        read(text)
    assert [part for part in said if part not in str(e.value)] == [] and "leave one out" in str(e.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"optim": {"learning_rate": 1e-4}, "optim": {"warmup_steps": 1}}',
        '{"rollout": {"n": 4, "n": 8}}',
        '{"reward": {"reward_kwargs": {"a": [{"k": 1, "k": 1}]}}}',
    ],
)
def test_a_key_given_twice_in_json_is_an_error(read, text):
    with pytest.raises(UserError, match="is given twice in one object.*leave one out"):
        read(text, name="my.json")


def test_a_mapping_on_the_command_line_has_no_key_twice():
    with pytest.raises(UserError, match="command line: reward.reward_kwargs={k: 1, k: 2}: key 'k' is given twice"):
        load_config(None, ["reward.reward_kwargs={k: 1, k: 2}"])


def test_a_merged_mapping_may_be_overridden(read):
    text = (
        "optim: &base {learning_rate: 1e-4, warmup_steps: 3}\nreward: {reward_kwargs: {<<: *base, warmup_steps: 5}}\n"
    )
    assert read(text).reward.reward_kwargs == {"learning_rate": 1e-4, "warmup_steps": 5}


def test_json_is_read_as_json(read):
    """With tabs, which YAML does not take, and numbers as they are."""
    text = json.dumps({"optim": {"learning_rate": 1e-05}, "trainer": {"seed": 7, "run_name": "x"}}, indent="\t")
    cfg = read(text, name="my.json")
    assert (cfg.optim.learning_rate, cfg.trainer.seed, cfg.trainer.run_name) == (1e-5, 7, "x")
    with pytest.raises(UserError, match="my.json is not valid JSON"):
        read("{'a': 1}", name="my.json")


# ---- texts that YAML takes for something else ----


@pytest.mark.parametrize(
    "text", ["2026-11-29", "1.10", "007", "1_000", "12:30:45", "on", "No", "1e3", "0x10", "2026-11-29 10:00:00"]
)
def test_a_text_in_a_file_is_taken_as_written(read, text):
    assert read(f"trainer: {{run_name: {text}}}\n").trainer.run_name == text
    assert read(f"rollout:\n  stop: [{text}, x]\n").rollout.stop == [text, "x"]
    assert read(f"rollout: {{stop: {text}}}\n").rollout.stop == [text]
    assert load_config(None, [f"rollout.stop=[{text}]"]).rollout.stop == [text]


def test_keys_and_dates_of_keyword_arguments_are_texts(read):
    cfg = read("reward: {reward_kwargs: {on: 1, since: 2026-11-29, k: 0.5, sure: true, l: [1, no]}}\n")
    assert cfg.reward.reward_kwargs == {"on": 1, "since": "2026-11-29", "k": 0.5, "sure": True, "l": [1, False]}


# ---- values that are empty ----


@pytest.mark.parametrize(
    "override",
    [
        "data.train_files=",
        "data.train_files=[]",
        "data.train_files=[ ]",
        "data.train_files=''",
        "data.train_files=['']",
        "data.val_files=[a.json, '']",
        "reward.path=",
        "reward.path=  ",
        'model.path=""',
        "trainer.run_name=",
        "trainer.output_dir=",
        "reward_func=",
        "custom_reward_function.path=",
        "optim.learning_rate=",
        "data.system_prompt=",
        "+reward.reward_kwargs.k=",
    ],
)
def test_an_empty_value_on_the_command_line_is_an_error(override):
    with pytest.raises(UserError, match=r"command line: .*(gives .* no value|has an empty text).*null for what is not"):
        load_config(None, [override.replace("[ ]", "[]")])


@pytest.mark.parametrize("text", ["[a.json, ]", "[a.json,]", "[,a.json]", "[a.json,, b.json]", "[a.json, , b.json]"])
def test_an_empty_entry_of_a_list_is_an_error(text):
    with pytest.raises(UserError, match="command line: 'data.val_files=.*: an entry of the list is empty"):
        load_config(None, [f"data.val_files={text}"])


@pytest.mark.parametrize("key", ["reward.path", "model.path", "data.train_files", "trainer.run_name", "rollout.stop"])
def test_an_empty_text_in_a_file_is_an_error(read, key):
    with pytest.raises(UserError, match=f"{key} has an empty text"):
        read(f"{key}: ''\n")


def test_an_empty_system_message_is_a_system_message(read):
    assert read('data: {system_prompt: ""}\n').data.system_prompt == ""


# ---- paths ----

PATHS = ["model.path", "data.train_files", "data.val_files", "data.test_files", "reward.path", "trainer.output_dir",
         "trainer.resume"]  # fmt: skip


@pytest.mark.parametrize("key", PATHS)
def test_a_tilde_is_the_home_folder_in_every_path(read, monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/me")
    for cfg in (read(f"{key}: ~/x y\n"), load_config(None, [f"{key}=~/x y"])):
        assert value_of(cfg, key) in ("/home/me/x y", ["/home/me/x y"])


def test_a_list_and_the_configuration_itself_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("trainer: {seed: 5}")
    cfg = load_config(Path("~/mine.yaml"), ["data.train_files=[~/a.json, b~.json, ./~/c.json]"])
    assert cfg.data.train_files == [f"{tmp_path}/a.json", "b~.json", "./~/c.json"]
    assert (cfg.trainer.seed, cfg.trainer.run_name) == (5, "mine")


@pytest.mark.parametrize("text", ["$HOME/out", "${HOME}/out", "/data/${oc.env:USER}/out", "~nobody-of-that-name/out"])
def test_what_would_become_a_folder_of_a_strange_name_is_refused(read, text):
    for how in (
        lambda: read(f"trainer: {{output_dir: '{text}'}}\n"),
        lambda: load_config(None, [f"output_dir={text}"]),
    ):
        with pytest.raises(UserError, match=r"trainer.output_dir = '.*out': (variables are not|there is no such user)"):
            how()


# ---- keys inside a mapping, and "off" ----


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("reward.reward_kwargs.k=1", "reward", "reward_kwargs", {"k": 1}),
        ("+reward.reward_kwargs.k=0.5", "reward", "reward_kwargs", {"k": 0.5}),
        ("++custom_reward_function.reward_kwargs.k=[a, 1]", "reward", "reward_kwargs", {"k": ["a", 1]}),
        ("+reward.reward_kwargs.a.b=yes", "reward", "reward_kwargs", {"a": {"b": True}}),
        ("data.chat_template_kwargs.enable_thinking=false", "data", "chat_template_kwargs", {"enable_thinking": False}),
        ("+data.apply_chat_template_kwargs.enable_thinking=False", "data", "chat_template_kwargs",
         {"enable_thinking": False}),
        ("reward.reward_kwargs.since=2026-11-29", "reward", "reward_kwargs", {"since": "2026-11-29"}),
        ("reward.reward_kwargs.k=1e-4", "reward", "reward_kwargs", {"k": 1e-4}),
        ("reward.reward_kwargs.k=null", "reward", "reward_kwargs", {"k": None}),
    ],
)  # fmt: skip
def test_a_key_inside_a_mapping_can_be_set(override, section, name, value):
    assert getattr(getattr(load_config(None, [override]), section), name) == value


def test_keys_inside_a_mapping_add_to_those_of_the_file(read):
    cfg = read("reward: {reward_kwargs: {a: 1, b: {c: 2}}}\n", "reward.reward_kwargs.b.d=3", "reward.reward_kwargs.a=0")
    assert cfg.reward.reward_kwargs == {"a": 0, "b": {"c": 2, "d": 3}}
    assert read("reward:\n  reward_kwargs.k: 7\n").reward.reward_kwargs == {"k": 7}


@pytest.mark.parametrize("override", ["rollout.n.k=1", "reward.reward_kwargs.=1", "reward.path.x=1", "kwargs.k=1"])
def test_a_key_inside_anything_else_is_unknown(override):
    with pytest.raises(UserError, match="unknown key"):
        load_config(None, [override])


def test_nothing_is_set_inside_a_number():
    with pytest.raises(UserError, match=r"reward.reward_kwargs.a.b: 'a' is set to 1, so nothing can be set inside it"):
        load_config(None, ["reward.reward_kwargs={a: 1}", "reward.reward_kwargs.a.b=2"])


@pytest.mark.parametrize("text", ["-1", "'-1'", "-1.0"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.save_freq", 0),
        ("trainer.test_freq", 0),
        ("eval.prompts", None),
        ("rollout.top_k", 0),
        ("actor_rollout_ref.rollout.top_k", 0),
        ("actor_rollout_ref.actor.fsdp_config.fsdp_size", None),
        ("actor_rollout_ref.actor.optim.lr_warmup_steps", 0),
        ("trainer.total_training_steps", None),
        ("trainer.keep_last", 0),
    ],
)
def test_minus_one_is_off_where_verl_means_it(key, value, text):
    from gspo.config_aliases import ALIASES

    assert value_of(load_config(None, [f"{key}={text}"]), ALIASES.get(key, key)) == value


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "no.yaml", tmp_path):
        with pytest.raises(UserError, match=re.escape(f"--config {path}: ")) as e:
            load_config(path)
        assert re.search(r"a preset in configs: [a-z_0-9, ]*quick[a-z_0-9, ]* or standard\.$", str(e.value))


@pytest.mark.parametrize("text", ["[0, 1]", "[-1, 1]", "[0.0, 0.5]"])
def test_a_list_of_numbers_may_hold_zero(text):
    assert load_config(None, [f"reward.range={text}"]).reward.range == yaml.safe_load(text)


@pytest.mark.parametrize("quote", ["'", '"'])
@pytest.mark.parametrize("key", [*PATHS, "reward_func"])
def test_quotes_around_a_path_are_not_part_of_it(read, key, quote):
    """As a notebook or a file of arguments hands them over; YAML takes those in a list away."""
    name = {"reward_func": "reward.path"}.get(key, key)
    cfg = load_config(None, [f"{key}={quote}a b{quote}"])
    assert value_of(cfg, name) in ("a b", ["a b"])
    assert load_config(None, ["trainer.output_dir=it's"]).trainer.output_dir == "it's"


@pytest.mark.parametrize(
    "key", ["model.path", "data.val_files", "data.system_prompt", "trainer.run_name", "reward_func"]
)
def test_the_none_of_python_is_no_text(read, key):
    for how in (lambda: load_config(None, [f"{key}=None"]), lambda: read(f"{key}: None\n")):
        with pytest.raises(UserError, match="= 'None': what is not set is written null"):
            how()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.learning_rate=1e-4", "optim.learning_rate=2e-4"], "optim.learning_rate is given twice; 0.0002 counts"),
        (["rollout.n=4", "num_generations=8"], "rollout.n is given twice; 8 counts, not 4."),
        (["data.train_files=a.json", "data.train_files=[b.json]"], "['b.json'] counts, not ['a.json']."),
        (["rollout.n=4", "+rollout.n=4"], ""),
        (["reward.reward_kwargs.a=1", "reward.reward_kwargs.b=1"], ""),
    ],
)
def test_of_a_parameter_that_the_command_line_gives_twice_the_one_that_counts_is_said(overrides, said):
    notes = []
    load_config(None, overrides, notes.append)
    assert len(notes) == bool(said) and said in "".join(notes)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["rollout.n", "=", "4"], "rollout.n = 4: a setting has no spaces; write rollout.n=4."),
        (["a=1", "rollout.n", "=4"], "rollout.n =4: a setting has no spaces; write rollout.n=4."),
        (["="], "command line: =: a setting has no spaces"),
        (["quick"], "'quick' is not of the form section.key=value. Is --config quick meant?"),
        (["configs/quick.yaml"], "Is --config configs/quick.yaml meant?"),
        (["quik"], "'quik' is not of the form section.key=value."),
    ],
)
def test_what_a_shell_has_cut_is_put_together(given, says):
    with pytest.raises(UserError, match=re.escape(says)) as e:
        load_config(None, given)
    assert ("meant" in str(e.value)) == ("meant" in says)

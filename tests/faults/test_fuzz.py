"""Whatever stands in a row, a checkpoint or a configuration: it is read, or refused in words.

Each case is drawn anew in every run; hypothesis prints how to repeat one that failed. What was found this way has a
plain test of its own.
"""

import json
import os
from dataclasses import fields

import pytest
import torch
from fuzz_values import LIMIT_S, damaged, fuzz, nested, numbers, objects_like, read_or_refused, texts, values
from hypothesis import given
from hypothesis import strategies as st
from saved_run import ALONE

from gspo.checkpoint import manifest
from gspo.checkpoint.checkpoints import State
from gspo.checkpoint.restore import load_state
from gspo.config import PARAMETERS, Config, dump, flatten, to_dict
from gspo.config_aliases import ALIASES
from gspo.data.encoding import Encoder
from gspo.data.prompts import survey
from gspo.data.row_checker import RowChecker
from gspo.errors import UserError
from gspo.launch_checks import check_launch, say_notes, say_progress, say_what_changed
from gspo.models.loading import load_model_config
from gspo.read_config import load_config
from gspo.reward.gold_check import gold_texts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S)]

# ---- data rows ----

messages = st.lists(
    objects_like(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool"]),
            "content": st.one_of(texts, st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}))),
            "tool_calls": st.lists(objects_like({"name": texts, "arguments": values}), max_size=2),
            "name": texts,
        }
    ),
    max_size=3,
)
rows = objects_like(
    {
        "prompt": st.one_of(texts, messages),
        "ground_truth": st.one_of(texts, numbers),
        "data_source": texts,
        "reward_model": st.fixed_dictionaries({"ground_truth": values}),
        "extra_info": st.dictionaries(texts, values, max_size=2),
        "solution": texts,
        "question": texts,
        "answer": st.sampled_from(["1 + 1\n#### 2", "####", "#### ,", "2"]),
        "problem": texts,
        "tools": st.one_of(
            st.lists(objects_like({"name": texts}), max_size=2), st.sampled_from(['[{"name": "f"}]', nested(9999)])
        ),
        "image": values,
    }
)
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.name }}{% endfor %}"
    "{% endfor %}{{ tools }}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@fuzz
@given(st.data())
def test_rows(tokenizer, tmp_path_factory, data):
    """From the file to what the reward function is sent; also with a chat template, and in the other format."""
    found = data.draw(st.lists(st.one_of(rows, rows, rows, values), min_size=1, max_size=4))
    as_list = data.draw(st.booleans())
    text = json.dumps(found) if as_list else "\n".join(json.dumps(row) for row in found)
    file = tmp_path_factory.getbasetemp() / ("rows.json" if as_list else "rows.jsonl")
    file.write_bytes(damaged(data, text))
    tokenizer.chat_template = data.draw(st.sampled_from([None, CHAT]))
    try:
        encoder = Encoder(tokenizer, data.draw(st.sampled_from([None, "", "be brief"])), vocab_size=len(tokenizer))
        checker = RowChecker(encoder, 24, 32, *data.draw(st.tuples(st.booleans(), st.booleans())))
        refused = []
        seen = read_or_refused(lambda: survey([str(file)], checker, refused.append))
        assert all(isinstance(e, UserError) for e in refused)
        for i in range(len(seen.prompts) if seen else 0):
            prompt = seen.prompts[i]
            assert 0 < len(prompt.ids) <= 24 and all(isinstance(text, str) for text in gold_texts(prompt))
            assert str(file) in seen.prompts.place(i) and prompt.text is not None
    finally:
        tokenizer.chat_template = None


# ---- configurations ----

defaults = flatten(to_dict(Config()))
of_parameter = {
    name: st.one_of(
        st.just(defaults[name]),
        st.just(defaults[name]),
        numbers,
        st.sampled_from([0, 1, 2, 0.5, "auto", "never", "none", "share", "[a,b]", "{a: 1}", "${X}", "~nobody/x", "-1"]),
        texts,
        values,
    )
    for name in PARAMETERS
}
keys = st.one_of(st.sampled_from([*PARAMETERS, *ALIASES]), st.sampled_from([*PARAMETERS]), texts)


ODD_YAML = ["", "a: &a [*a]", "<<: {x: 1}", "? [a]", "- 1", "!!python/object:os.x {}", "x: !!set {a}", "--- 1\n--- 2",
            "a: 0x", "b: 1_0", "c: 1:30", "d: .inf", "\t", "%YAML 9", "? a\n? b", "e: 2026-13-45", "f: !!binary x",
            "g: !!int x", "h: !!float []", "i: 0b", "j: 08", "rollout: &r {n: 4}\nobjective: *r"]  # fmt: skip


@st.composite
def yaml_texts(draw) -> str:
    """Draw a file of settings, mostly of the right form; JSON is YAML, but for what a human writes."""
    tree: dict = {}
    for key in draw(st.lists(keys, max_size=5)):
        section, dot, name = key.partition(".")
        value = draw(of_parameter.get(key, values))
        if dot and draw(st.booleans()):
            tree.setdefault(section, {})
            if isinstance(tree[section], dict):
                tree[section][name] = value
        else:
            tree[key] = value
    if draw(st.booleans()):
        return json.dumps(tree)
    lines = [f"{key}:{draw(st.sampled_from([' ', '  ', '']))}{json.dumps(value)}" for key, value in tree.items()]
    return "\n".join([*lines, draw(st.sampled_from(ODD_YAML))])


@st.composite
def arguments(draw) -> str:
    key = draw(keys) + draw(st.sampled_from(["", "", "", "", ".x", ".", ".x.y"]))
    value = draw(of_parameter.get(key, values))
    written = draw(st.sampled_from([json.dumps(value), str(value), str(value)]))
    return (
        f"{draw(st.sampled_from(['', '', '+']))}{key}{draw(st.sampled_from(['=', '=', '=', '==', ' = ', '']))}{written}"
    )


@fuzz
@given(st.data())
def test_configurations(tmp_path_factory, capsys, data):
    """YAML and JSON files and arguments, and what is checked and said of them at a launch."""
    file = tmp_path_factory.getbasetemp() / data.draw(st.sampled_from(["c.yaml", "c.json"]))
    text = damaged(data, data.draw(yaml_texts()), depths=(100, 700))  # PyYAML takes seconds for more
    file.write_bytes(text)
    given_arguments = data.draw(st.lists(arguments(), max_size=3))
    cfg = read_or_refused(lambda: load_config(file if data.draw(st.booleans()) else None, given_arguments))
    if cfg is None:
        return
    file.with_suffix(".yaml").write_text(dump(cfg), encoding="utf-8")
    assert load_config(file.with_suffix(".yaml")) == cfg, "config.yaml holds what was read"
    steps = cfg.trainer.max_steps or cfg.trainer.total_epochs
    read_or_refused(lambda: (check_launch(cfg, load_model_config(None), ALONE, started=False), say_notes(cfg, steps)))


# ---- checkpoints ----

STATE = {
    "step": 3, "round": 1, "planned_steps": 9, "total_steps": 9, "bad_steps": 0, "round_rewards": [[0.0, 1.0]],
    "pair_metrics": {"preference_accuracy": 0.5}, "tokens_sampled": 100, "response_length": 4.5,
    "response_entropy": 1.25, "precision": "fp32", "best_accuracy": 0.5, "best_step": 2,
    "best_reward": 0.5,
}  # fmt: skip
assert {*STATE, "torch_rng"} == {f.name for f in fields(State)}
states = st.builds(
    lambda changes, rng: {**STATE, "torch_rng": rng, **changes},
    objects_like({name: st.just(value) for name, value in STATE.items()}),
    st.sampled_from([[], torch.get_rng_state().tolist()]),
)


@fuzz
@given(st.data())
def test_states(tmp_path_factory, capsys, data):
    """Read state.json, and use what was read: say how far the run is, count a bad step."""
    checkpoint = tmp_path_factory.getbasetemp() / "step_000003"
    (checkpoint / "trainer").mkdir(parents=True, exist_ok=True)
    (checkpoint / "trainer" / "state.json").write_bytes(damaged(data, json.dumps(data.draw(st.one_of(states, values)))))
    manifest.find_damage(checkpoint, ALONE, required=False)
    state = read_or_refused(lambda: load_state(checkpoint))
    if state is None:
        return
    cfg, total = Config(), data.draw(st.sampled_from([1, 9, 10**9]))
    for schedule in ("constant", "linear", "cosine"):
        cfg.optim.schedule = schedule
        say_what_changed(state, cfg, total, data.draw(st.integers(0, 3)))
    say_progress(checkpoint, state.step, cfg, total)
    read_or_refused(lambda: state.count_non_finite(1, 1, "loss", lambda: [1, 2]))
    state.is_best({"heldout/accuracy": 0.5, "heldout/reward_mean": 0.6})
    if state.torch_rng:
        torch.set_rng_state(torch.tensor(state.torch_rng, dtype=torch.uint8))


names = st.one_of(
    st.sampled_from(["model.safetensors", "trainer/state.json", "trainer", "/dev/zero", "/dev/null", "..", "", "fifo"]),
    st.just("n" * 300),
    texts,
)
entries = st.dictionaries(
    names, st.tuples(st.one_of(numbers, st.just(3), values), st.one_of(texts, values)), max_size=3
)


@fuzz
@given(st.data())
def test_manifests(tmp_path_factory, data):
    """A manifest of any content, also one with a valid checksum of its own, names the damage or is complete."""
    checkpoint = tmp_path_factory.getbasetemp() / "step_000004"
    (checkpoint / "trainer").mkdir(parents=True, exist_ok=True)
    if not (checkpoint / "fifo").exists():
        os.mkfifo(checkpoint / "fifo")
    (checkpoint / "model.safetensors").write_bytes(b"abc")
    if data.draw(st.booleans()):
        files = data.draw(entries)
        text = manifest._text(files)
    else:
        listed = st.dictionaries(names, objects_like({"bytes": numbers, "sha256": texts}), max_size=3)
        text = json.dumps(data.draw(objects_like({"format": st.just(1), "files": listed, "sha256": texts})))
    (checkpoint / manifest.NAME).write_bytes(damaged(data, text))
    found = manifest.find_damage(checkpoint, ALONE)
    assert isinstance(found, str)
    assert found or json.loads(text)["files"].keys() <= {"model.safetensors"}

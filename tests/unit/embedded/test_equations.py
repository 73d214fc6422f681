"""The embedded task and model: disjoint splits, true answers, the same bytes every time."""

import json
import random
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from gspo.embedded import MODEL_DIR
from gspo.embedded.equations import SEED_ROW, SPLIT_SIZES, TRAPS, split_equations, worked_solution, write_splits
from gspo.reward.reward_func import compute_score


@pytest.fixture(scope="module")
def splits():
    return split_equations()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equations")
    write_splits(folder)
    return folder


@pytest.fixture(scope="module")
def rows(written):
    return {name: json.loads((written / f"{name}.json").read_text(encoding="utf-8")) for name in SPLIT_SIZES}


def sides(equation, x):
    """Both sides of `3x - 2 = 7` at x, exactly."""
    exact = re.sub(r"(\d+)", r"Fraction(\1)", re.sub(r"(\d)x", r"\1 * x", equation))
    left, right = exact.split("=")
    return tuple(eval(side, {"Fraction": Fraction, "x": Fraction(x)}) for side in (left, right))


def equation_of(row):
    return re.split(r"：|: ", row["prompt"], maxsplit=1)[1]


# ---- the task ----


def test_no_equation_is_in_two_splits(splits):
    texts = [e.text for part in splits.values() for e in part]
    assert len(texts) == len(set(texts))
    assert {name: len(splits[name]) for name in SPLIT_SIZES} == SPLIT_SIZES == {"train": 2048, "dev": 256, "test": 512}


def test_no_written_equation_is_in_two_files_or_in_the_warm_start(rows, splits):
    texts = [equation_of(row) for part in rows.values() for row in part]
    assert len(texts) == len(set(texts)) == 2048 + 256 + 512
    assert not set(texts) & {e.text for e in splits["warm"]}


def test_every_shape_is_in_every_split_and_equally_common(splits):
    for name in SPLIT_SIZES:
        shapes = [e.shape for e in splits[name]]
        assert set(TRAPS) < set(shapes) and len(set(shapes)) == 8
        assert max(map(shapes.count, set(shapes))) < len(shapes) / 5


def test_the_example_of_the_original_description_is_the_first_row(rows):
    first = rows["train"][0]
    assert {name: first[name] for name in SEED_ROW} == SEED_ROW
    assert SEED_ROW == {"prompt": "解方程：x + 5 = 12", "ground_truth": "7", "data_source": "math_reasoning"}


@pytest.mark.parametrize("name", SPLIT_SIZES)
def test_the_stated_answer_is_the_equations_only_root(rows, name):
    for row in rows[name]:
        left, right = sides(equation_of(row), row["ground_truth"])
        assert left == right, row
        left, right = sides(equation_of(row), int(row["ground_truth"]) + 1)
        assert left != right, row  # linear and not constant: one root


def test_both_languages_are_asked_about_equally_often(rows):
    sources = [row["data_source"] for row in rows["train"][1:]]
    assert set(sources) == {"equations_en", "equations_zh"}
    assert abs(sources.count("equations_zh") / len(sources) - 0.5) < 0.05
    for row in rows["train"][1:]:
        assert (re.search("[一-鿿]", row["prompt"]) is not None) == (row["data_source"] == "equations_zh")


def test_the_files_are_the_same_bytes_every_time(written, tmp_path):
    write_splits(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dev.json", "test.json", "train.json"]
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (written / file.name).read_bytes()


def test_the_written_solutions_earn_the_full_reward(rows):
    for row in random.Random(0).sample(rows["train"] + rows["dev"] + rows["test"], 300):
        assert compute_score(row["data_source"], row["solution"], row["ground_truth"]) == 1.0, row


@pytest.mark.parametrize("language", ["en", "zh"])
def test_right_solutions_of_the_warm_start_earn_it_too(splits, language):
    rng = random.Random(1)
    for e in rng.sample(splits["warm"], 150):
        solution = worked_solution(e, language, rng, mistakes=False)
        assert compute_score("any", solution, str(e.answer)) == 1.0, (e.text, solution)


def test_mistakes_are_as_frequent_as_meant_and_cost_the_full_reward(splits):
    rng, full = random.Random(2), {True: [], False: []}
    for e in rng.sample(splits["warm"], 3000):
        if any(step.value() == step.value(step.wrong_op) for step in e.steps):
            continue  # 0 / 9 is 0 * 9
        solution = worked_solution(e, "en", rng, mistakes=True)
        right = solution == worked_solution(e, "en", rng, mistakes=False)
        assert (compute_score("any", solution, str(e.answer)) == 1.0) == right, (e.text, solution)
        if e.answer >= 0:  # a negative one may lose its sign besides
            full[e.shape in TRAPS].append(right)
    assert sum(full[True]) / len(full[True]) == pytest.approx(0.30, abs=0.04)
    assert sum(full[False]) / len(full[False]) == pytest.approx(0.50, abs=0.04)


# ---- the tokenizer ----


@settings(max_examples=150)
@given(st.text())
def test_the_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    "text", [" a  b ", "x = -3 .", "\n\n\t", "don 't , no !", "解方程：½ x ≠ ７", "𝔘🙂\u200d", "\x00\x7f\u2028"]
)
def test_spaces_punctuation_and_rare_characters_survive(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_digits_stay_single(tokenizer):
    ids = tokenizer("1234567890 + 12 = 007", add_special_tokens=False)["input_ids"]
    assert [t for t in tokenizer.convert_ids_to_tokens(ids) if re.search(r"\d", t)] == list("123456789012007")


# ---- the model ----


def test_the_model_folder_is_small_and_opens_completely(tokenizer):
    assert sum(f.stat().st_size for f in MODEL_DIR.iterdir()) <= 4 * 2**20
    model, info = AutoModelForCausalLM.from_pretrained(MODEL_DIR, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as stored:
        state = model.state_dict()
        assert all(state[name].equal(stored.get_tensor(name)) for name in stored.keys())  # noqa: SIM118
    assert len(tokenizer) <= model.config.vocab_size
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>") == tokenizer.eos_token_id


def nats_per_token(model, tokenizer, prompt, answer):
    prompt, answer = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, answer))
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + answer])).logits[0, :-1].log_softmax(-1)
    return -float(logprobs[len(prompt) - 1 :].gather(1, torch.tensor(answer)[:, None]).mean())


def test_the_model_has_learned_the_task_but_not_to_perfection(embedded_model, tokenizer, rows):
    found = {True: [], False: []}
    for i, row in enumerate(rows["test"][:40]):
        other = rows["test"][i + 1]
        for right, solution in ((True, row["solution"]), (False, other["solution"])):
            text = f"<|user|>{row['prompt']}<|assistant|>"
            found[right].append(nats_per_token(embedded_model, tokenizer, text, solution + "<|end|>"))
    right, another = (sum(found[k]) / 40 for k in (True, False))
    assert 0.02 < right < 1.0 < another  # a uniform guess has 5.9


@pytest.mark.slow
def test_building_twice_gives_the_same_bytes_and_the_tokenizer_that_ships(run_program, tmp_path):
    for name in ("a", "b"):
        done = run_program("-m", "gspo.embedded.build_models", "--steps", 2, "--batch", 16, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert {*files} == {p.name for p in MODEL_DIR.iterdir()} - {"README.md"}
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (MODEL_DIR / file).read_bytes(), file

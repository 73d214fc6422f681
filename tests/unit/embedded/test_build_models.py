"""The models that ship: the same bytes as ever, and the later ones start where there is something to learn."""

import hashlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import brackets_reward, sorting_reward
from gspo.embedded import brackets, equations, sorting, systems, weekdays
from gspo.embedded.task import SPLIT_SIZES, make_rows
from gspo.models.loading import load_model, load_tokenizer
from gspo.reward import reward_func
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import Sampler
from gspo.types import Prompt

# sha256 of model.safetensors: what was measured was measured on these.
WEIGHTS = {
    equations: "ee5daa76fbd96524dc50a558de92011bed29ded2308aaf0d1b99323ccf29713d",
    systems: "e60b60d12a8a3a571895061d54aedf2eeb60eeb32a610453f82ca10051c5eedc",
    sorting: "daa7a37dc6848689b6f0b834e089541da4da8d68c9b5fd5632a2b63d97372112",
    weekdays: "f8bc6c7cc766b11c1aefb1e5a4a219a8afa3f3b7d47f3b60f0134f9b081ab1db",
    brackets: "e2deb9d72b08e3f1b2e4208d008628fa46c572f3a7e40dbeb57a7e15fd1b4bf8",
}
LATER = {sorting: sorting_reward, weekdays: reward_func, brackets: brackets_reward}  # with their reward functions


def name(module):
    return module.__name__.rpartition(".")[2]


@pytest.mark.parametrize("module", WEIGHTS, ids=name)
def test_the_weights_are_the_same_bytes_as_ever(module):
    stored = (module.TASK.model_dir / "model.safetensors").read_bytes()
    assert hashlib.sha256(stored).hexdigest() == WEIGHTS[module]


@pytest.mark.parametrize("module", LATER, ids=name)
def test_a_later_model_is_the_first_ones_architecture_in_half_the_bytes(module):
    first, config = (
        json.loads((folder / "config.json").read_text()) for folder in (equations.TASK.model_dir, module.TASK.model_dir)
    )
    assert config == {**first, "dtype": "bfloat16"}
    assert sum(f.stat().st_size for f in module.TASK.model_dir.iterdir()) <= 1.5 * 2**20
    model, info = AutoModelForCausalLM.from_pretrained(module.TASK.model_dir, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in model.parameters()) == 648_064


@pytest.mark.parametrize("module", LATER, ids=name)
def test_a_later_tokenizer_gives_texts_back_and_keeps_digits_and_brackets_single(module):
    task = module.TASK
    tokenizer = load_tokenizer(str(task.model_dir))
    first = load_tokenizer(str(equations.TASK.model_dir))
    assert tokenizer.chat_template == first.chat_template and tokenizer.all_special_tokens == first.all_special_tokens
    for text in ("1234567890 + 12 = 007", " a  b ½ ７ 🙂 解", "([{<>}])"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    single = "1234567890" + "([{<>}])" * (module is brackets)
    ids = tokenizer(single, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == list(single)


@pytest.mark.parametrize("module", LATER, ids=name)
def test_a_later_model_is_right_half_of_the_time_or_less_often_and_much_more_often_once_in_eight(module):
    task = module.TASK
    model, tokenizer = load_model(str(task.model_dir)), load_tokenizer(str(task.model_dir))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    sampler = Sampler(model, tokenizer, next(model.parameters()).device)
    prompts = []
    for i, row in enumerate(make_rows(task, task.split_problems(), SPLIT_SIZES)["test"][:48]):
        text = f"<|user|>{row['prompt']}<|assistant|>"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(i, tuple(ids), text, row["ground_truth"], row["data_source"]))
    sampled = sampler.generate(prompts, 8, Sampling(temperature=0.9, max_new_tokens=64))
    score = LATER[module].compute_score
    groups = [
        [score(p.data_source, t, p.ground_truth) == 1.0 for t in texts]
        for p, texts in zip(prompts, sampled.texts, strict=True)
    ]
    share = sum(map(sum, groups)) / (8 * len(groups))
    assert 0.2 < share < 0.6, share
    assert sum(map(any, groups)) / len(groups) > share + 0.25, share


@pytest.mark.slow
@pytest.mark.parametrize("module", LATER, ids=name)
def test_building_twice_gives_the_same_bytes_and_the_tokenizer_that_ships(run_program, tmp_path, module):
    folder = module.TASK.model_dir
    for out in ("a", "b"):
        command = ("--task", name(module), "--steps", 2, "--batch", 16, "--out", tmp_path / out)
        done = run_program("-m", "gspo.embedded.build_models", *command)
        assert done.returncode == 0, done.stderr
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert {*files} == {p.name for p in folder.iterdir()} - {"README.md"}
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (folder / file).read_bytes(), file

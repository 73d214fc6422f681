"""Tags that a tokenizer marks as special are part of a response's text; end and padding tokens are not."""

import functools
import threading

import numpy as np
import pytest
import torch

import eval as eval_program
from gspo.distributed.world import World
from gspo.embedded import MODEL_DIR
from gspo.models.loading import load_model, load_tokenizer
from gspo.read_config import load_config
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.response_text import GroupTexts, decode, special_tags, tags_note
from gspo.rollout.sampler import Sampler
from gspo.rollout.stop_strings import StopStrings
from gspo.sample import sample

THINK = ["<think>", "</think>", "<answer>", "</answer>"]
WILD = Sampling(temperature=50.0, max_new_tokens=64)  # so that every token is drawn now and then
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float("<think>" in solution_str)
"""
WORLD = World(0, 1, torch.device("cpu"), None)


def tagged(*tags):
    """The embedded tokenizer, which knows these special tokens as well."""
    tokenizer = load_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tags)})
    return tokenizer


KINDS = {  # special tokens -> those that are tags
    "thoughts and answers": (THINK, THINK),
    "tool calls": (["<tool_call>", "</tool_call>"], ["<tool_call>", "</tool_call>"]),
    "tool calls without an end": (["[TOOL_CALLS]", "[TOOL_RESULTS]"], ["[TOOL_CALLS]", "[TOOL_RESULTS]"]),
    "begin and end": (["<|begin_of_thought|>", "<|end_of_thought|>"], ["<|begin_of_thought|>", "<|end_of_thought|>"]),
    "start and end": (["<|x_start|>", "<|x_end|>"], ["<|x_start|>", "<|x_end|>"]),
    "brackets": (["[X]", "[/X]"], ["[X]", "[/X]"]),
    "bars": (["<|x|>", "<|/x|>"], ["<|x|>", "<|/x|>"]),
    "reserved": (["<|reserved_special_token_0|>", "<extra_id_1>"], []),
    "one half of a pair": (["<x>"], []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tags_reach_the_text_of_a_response_and_are_named(kind):
    special, tags = KINDS[kind]
    tokenizer = tagged(*special)
    ids = tokenizer(f"{special[0]}x = 7{special[-1]}7", add_special_tokens=False)["input_ids"]
    dropped = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert decode(tokenizer, [*ids, *dropped], dropped) == f"{special[0]}x = 7{special[-1]}7"
    assert decode(tokenizer, [*ids, *dropped], dropped, skip_special_tokens=True) == "x = 77"
    assert special_tags(tokenizer, dropped) == tags


def test_what_a_chat_template_writes_around_messages_is_no_tag(tokenizer):
    assert special_tags(tokenizer, {0, 1}) == [] and tags_note([], False) == ""


def test_tokens_that_are_tags_but_not_special_need_no_word():
    tokenizer = load_tokenizer(None)
    tokenizer.add_tokens(THINK)
    assert special_tags(tokenizer, {0, 1}) == []


@pytest.mark.parametrize("skips", [False, True])
def test_sampled_texts_are_what_was_drawn_and_one_line_says_so(skips, embedded_model, capsys):
    tokenizer = tagged(*THINK)
    answers = sample(
        embedded_model, ["x = 1"] * 4, 8, WILD, tokenizer=tokenizer, precision="fp32", skip_special_tokens=skips
    )
    drawn = [answer for group in answers for answer in group]
    tags = set(tokenizer.convert_tokens_to_ids(THINK))
    assert any(tags & {*answer.tokens} for answer in drawn)
    for answer in drawn:
        assert answer.text.count("think>") == (0 if skips else sum(t in (343, 344) for t in answer.tokens))
        assert "<|end|>" not in answer.text and "<|pad|>" not in answer.text
    said = capsys.readouterr().out
    assert said.count("marks <think>, </think>, <answer>, </answer> as special") == 1
    assert ("neither the reward function nor samples see them" in said) == skips


@pytest.mark.parametrize("skips", [False, True])
def test_the_reward_function_of_an_evaluation_sees_them(skips, tmp_path):
    tagged(*THINK).save_pretrained(tmp_path / "m")
    embedded = load_model(None)
    embedded.save_pretrained(tmp_path / "m")
    (tmp_path / "reward.py").write_text(REWARD)
    flags = [
        "data.train_files=embedded",
        "data.test_files=embedded",
        "eval.prompts=8",
        "eval.n=4",
        f"reward.path={tmp_path / 'reward.py'}",
    ]
    flags += ["rollout.temperature=50", "rollout.max_new_tokens=64", "reward.workers=1", "eval.round_prompts=0"]
    cfg = load_config(None, [*flags, f"rollout.skip_special_tokens={str(skips).lower()}"])
    answers = eval_program.evaluate(str(tmp_path / "m"), cfg, WORLD)
    assert (torch.tensor(answers.rewards).sum() > 0) == (not skips)


@pytest.mark.parametrize("skips", [False, True])
def test_a_tag_as_stop_string_ends_a_response_in_both_ways(skips, embedded_model):
    tokenizer = tagged(*THINK)
    sampler = Sampler(embedded_model, tokenizer, WORLD.device, skip_special_tokens=skips)
    stops = StopStrings(tokenizer, ("</answer>",), 352, WORLD.device)
    ids = torch.tensor([tokenizer("<answer>7</answer>7", add_special_tokens=False)["input_ids"]])
    ends = functools.partial(stops.ends, ids, torch.tensor([0]))
    assert int(ends(torch.tensor([0]), torch.tensor([ids.shape[1]]))) == 3
    text = sampler._text(ids[0, :3].tolist())
    assert text == ("7" if skips else "<answer>7</answer>")


def test_padding_that_a_model_draws_is_left_out(embedded_model, tokenizer):
    sampler = Sampler(embedded_model, tokenizer, WORLD.device)
    ids = tokenizer("x = 7", add_special_tokens=False)["input_ids"]
    assert sampler._text([0, *ids, 0, 1]) == "x = 7"


def test_the_embedded_models_files_are_as_they_were():
    assert special_tags(load_tokenizer(str(MODEL_DIR)), {0, 1}) == []


# ---- beside sampling ----


@pytest.mark.parametrize("beside", [False, True])
def test_texts_are_handed_over_in_order_whichever_thread_decodes(beside):
    decoders, handed = set(), []

    def spelled(ids):
        decoders.add(threading.current_thread())
        return " ".join(map(str, ids))

    def hand_over(group, texts):
        assert threading.current_thread() is threading.main_thread()
        handed.append((group, texts))

    with GroupTexts(spelled, hand_over, beside) as texts:
        for group in (2, 0, 1):
            texts.add(group, np.array([[group, 7, 0], [5, 6, 7]]), np.array([2, 3]))
    assert handed == [(g, [f"{g} 7", "5 6 7"]) for g in (2, 0, 1)]
    assert len(decoders) == 1 and (threading.main_thread() in decoders) != beside


def test_what_fails_in_the_other_thread_is_raised_and_nothing_waits_after_an_error():
    ids, one = np.array([[1]]), np.array([1])
    with pytest.raises(KeyError), GroupTexts(lambda ids: {}[7], lambda *_: None, beside=True) as texts:
        texts.add(0, ids, one)
    handed = []
    with pytest.raises(ZeroDivisionError), GroupTexts(str, lambda *x: handed.append(x), beside=True):
        raise ZeroDivisionError
    assert not handed

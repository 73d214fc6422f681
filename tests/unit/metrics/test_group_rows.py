"""What samples.jsonl keeps of a group."""

import math

import torch

from gspo.metrics.group_rows import group_row
from gspo.types import Prompt, Rollout, Scores


def test_a_group_is_kept_as_the_model_saw_it_and_as_it_was_scored(tokenizer):
    ids = tuple(tokenizer("<|user|>x + 1 = 2<|assistant|>")["input_ids"])
    lengths, zeros = torch.tensor([[3, 5, 2]]), torch.zeros(1, 3, 5)
    rollout = Rollout(
        [Prompt(0, ids, "x + 1 = 2", "1", "math")],
        zeros.long(),
        lengths,
        zeros,
        zeros,
        torch.tensor([[True, False, True]]),
        [["a", "b", "gold"]],
        sampled=torch.tensor([[True, True, False]]),
    )
    parts = {"acc": torch.tensor([[1.0, 0.0]]), "style": torch.tensor([[math.nan, 0.1234567]])}
    scores = Scores(torch.tensor([[1.0, 1 / 3]]), {**parts, "other": torch.full((1, 2), math.nan)})
    assert group_row(rollout, scores, 0, tokenizer) == {
        "prompt": "x + 1 = 2",
        "model_input": "<|user|>x + 1 = 2<|assistant|>",
        "data_source": "math",
        "ground_truth": "1",
        "responses": ["a", "b"],
        "rewards": [1.0, 0.333333],
        "lengths": [3, 5],
        "finish_reasons": ["stop", "length"],
        "reward_parts": {"acc": [1.0, 0.0], "style": [None, 0.123457]},
    }

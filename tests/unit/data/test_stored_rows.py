"""Rows that hold responses: the shapes in which they are published, what is wrong with a row, and their tokens."""

import json

import pytest
import torch

from gspo.data.prompts import load_splits
from gspo.data.stored_rows import split_row, stored_groups
from gspo.errors import UserError
from gspo.models.loading import load_model_config
from gspo.read_config import load_config
from gspo.types import Prompt, StoredResponses

USER = {"role": "user", "content": "1 + 1?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("2", "3"))
SYSTEM = {"role": "system", "content": "Count."}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}, "1 + 1?"),  # texts
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, [USER]),  # TRL's conversations
        ({"chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]}, [SYSTEM, USER]),  # ... the prompt inside
        ({"prompt": "1 + 1?", "chosen": [USER, YES], "rejected": [USER, NO]}, [USER]),  # UltraFeedback's
    ],
)
def test_pairs_are_read_as_they_are_published(row, prompt):
    rest, stored = split_row({**row, "score_chosen": 8.0}, "a")
    assert rest["prompt"] == prompt and "chosen" not in rest and rest["score_chosen"] == 8.0
    assert stored == StoredResponses(("2", "3"), (1.0, 0.0), (True, True))


def test_groups_keep_their_rewards_and_say_what_was_cut_off():
    group = {"prompt": "a", "responses": ["x", "", "z"], "rewards": [1, 0.5, -2.0]}
    assert split_row(group, "a")[1] == StoredResponses(("x", "", "z"), (1.0, 0.5, -2.0), (True, True, True))
    reasons = {**group, "finish_reasons": ["length", "stop", "stop"]}
    assert split_row(reasons, "a")[1].finished == (False, True, True)


PAIR = {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}
GROUP = {"prompt": "1 + 1?", "responses": ["2", "3"], "rewards": [1.0, 0.0]}
WRONG = [
    ({"prompt": "1 + 1?"}, "needs `chosen` and `rejected`"),
    ({"prompt": "1 + 1?", "chosen": "2"}, "field 'rejected' must be a text, or a list .* got nothing"),
    ({"chosen": "2", "rejected": "3"}, "field 'prompt' is missing"),
    ({**PAIR, "chosen": 2}, "field 'chosen' must be a text"),
    ({**PAIR, "chosen": [USER]}, "field 'chosen' must be .* that ends in the assistant's"),
    ({**PAIR, "chosen": [{"role": "assistant", "content": None}]}, "field 'chosen' must be"),
    ({**PAIR, "chosen": [USER, NO, YES], "rejected": [USER, NO, NO]}, "ends in two messages of the assistant"),
    ({"chosen": [USER, YES], "rejected": [SYSTEM, USER, NO]}, "answer different prompts"),
    ({**PAIR, "prompt": "2?", "chosen": [USER, YES], "rejected": [USER, NO]}, "'prompt' is not what 'chosen' answers"),
    ({**GROUP, "responses": ["2"]}, "field 'responses' must be a list of two texts or more"),
    ({**GROUP, "responses": ["2", 3]}, "field 'responses' must be a list of two texts or more"),
    ({**GROUP, "rewards": [1.0]}, "field 'rewards' must be a list of 2 finite numbers"),
    ({**GROUP, "rewards": [1.0, None]}, "field 'rewards' must be a list of 2 finite numbers"),
    ({**GROUP, "rewards": None}, "field 'rewards' must be a list of 2 finite numbers"),
    ({**GROUP, "finish_reasons": ["stop", "end"]}, "field 'finish_reasons' must be 2 of 'stop' or 'length'"),
    ({**GROUP, "responses": ["", "3"], "finish_reasons": ["length", "stop"]}, "cut off .* has no text"),
    ({"prompt": "1 + 1?", "responses": ["2"] * 3, "rewards": [1.0] * 3}, "holds 3 responses, the first row 2"),
    ({**PAIR, "ground_truth": "2"}, "has a ground_truth, the first has none"),
    ({**PAIR, "chosen": "2" * 40}, "a response has 41 tokens, its end included, rollout.max_new_tokens is 32"),
]


def load(tokenizer, *overrides):
    cfg = load_config("configs/dpo.yaml", ["data.val_files=[]", *overrides])
    return load_splits(cfg, tokenizer, load_model_config(None), stored=True)


@pytest.mark.parametrize(("row", "said"), WRONG)
def test_a_wrong_row_is_named_in_one_paragraph(tokenizer, write, row, said):
    files = f"data.train_files={write([PAIR, row])}"
    with pytest.raises(UserError, match=rf"rows.json, row 2: .*{said}") as e:
        load(tokenizer, files, "data.test_files=[]")
    assert "\n" not in str(e.value)


def test_long_responses_can_be_dropped_and_equal_ones_are_said(tokenizer, write, capsys):
    files = write([PAIR, {**PAIR, "chosen": "2" * 40}, {**PAIR, "rejected": "2"}])
    found = load(tokenizer, f"data.train_files={files}", "data.test_files=[]", "data.overlong=drop")
    assert [p.stored.texts for p in found.train] == [("2", "3"), ("2", "2")]
    assert "nothing is learned from 1 rows" in capsys.readouterr().out


def test_parquet_holds_conversations(tokenizer, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": "1 + 1?", "chosen": [USER, YES], "rejected": [USER, NO]}] * 2
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = (
        load(tokenizer, f"data.train_files={tmp_path / name}", "data.test_files=[]")
        for name in ("a.parquet", "a.jsonl")
    )
    assert [*one.train] == [*other.train] and one.fingerprints == other.fingerprints
    assert one.train[0].stored.texts == ("2", "3") and one.train[0].ground_truth is None


def test_the_end_token_follows_what_ended_by_itself(tokenizer):
    end = tokenizer.eos_token_id
    rows = [
        StoredResponses(("x = 2", "x"), (1.0, 0.1), (False, True)),
        StoredResponses(("", "y"), (0.0, 1.0), (True,) * 2),
    ]
    prompts = [Prompt(i, (4,), "", None, "", stored=row) for i, row in enumerate(rows)]
    places, rollout, scores = stored_groups(prompts, [1, 0], tokenizer, end, torch.device("cpu"))
    whole = tokenizer("x = 2", add_special_tokens=False)["input_ids"]
    assert places == [1, 0] and [p.id for p in rollout.prompts] == [1, 0]
    assert rollout.tokens[1, 0, : len(whole)].tolist() == whole and rollout.lengths[1].tolist() == [len(whole), 2]
    assert rollout.tokens[0, 0, 0] == end and rollout.lengths[0].tolist() == [1, 2]
    assert scores.rewards.tolist() == [[0.0, 1.0], [1.0, pytest.approx(0.1)]]
    assert rollout.finished.tolist() == [[True, True], [False, True]]
    none = stored_groups(prompts, [], tokenizer, end, torch.device("cpu"))[1]
    assert none.tokens.shape == (0, 2, 0), "a rank without prompts"

"""Whatever a reward function returns, or writes where its replies are read, is scored or counted as a fault.

Each case is drawn anew in every run; hypothesis prints how to repeat one that failed.
"""

import json
import struct

import pytest
import torch
from fuzz_values import LIMIT_S, fuzz, nested, numbers, objects_like, read_or_refused, texts, values
from hypothesis import given
from hypothesis import strategies as st

from gspo.config import Reward
from gspo.reward.scorer import Scorer
from gspo.types import Prompt, Rollout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S)]

SPEAKER = """
import os, struct, sys

CHANNEL = os.dup(int(sys.argv[1]))  # of our replies

class Odd:
    def __str__(self): raise ValueError("no text")
    def __float__(self): raise OverflowError("no number")
    def item(self): raise RuntimeError("no item")
    def get(self, key): return self
    def __iter__(self): return iter([(0, self), self])

def answer(extra_info):
    for message in extra_info["forged"]:
        os.write(CHANNEL, message)
    odd = {"odd": Odd(), "odd parts": {"score": 1, "a": Odd(), Odd(): 1, "pred": Odd()}, "set": {1, 2}}
    value = extra_info["value"]
    return odd.get(value, value) if isinstance(value, str) else value

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return answer(extra_info)
"""
RANKER = "def rank_responses(responses, ground_truth, data_source, extra_info=None):\n    return answer(extra_info)\n"

scores = st.one_of(st.floats(0, 1), st.sampled_from([0, 1, True, 0.5]), numbers)
parts = st.dictionaries(texts, numbers, max_size=2)
answers = st.one_of(
    scores,
    objects_like({"score": scores, "pred": texts, "acc": scores, "errors": numbers}),
    st.lists(st.tuples(st.integers(-1, 2), st.one_of(scores, objects_like({"score": scores}))), max_size=3),
    st.sampled_from(["odd", "odd parts", "set"]),
    values,
)
scored = {"score": scores, "parts": parts, "pred": texts}
replies = objects_like(
    {
        **scored,
        "scores": st.lists(objects_like(scored), max_size=3),
        "fault": st.fixed_dictionaries({"kind": texts, "message": texts, "trace": texts}),
        "timeout": st.just(""),
        "last": st.sampled_from([False] * 40 + [True]),  # after which a process is replaced
    }
)


def framed(message: bytes) -> bytes:
    return struct.pack(">I", len(message)) + message


@st.composite
def forged(draw, index: int) -> list[bytes]:
    """Draw what the function writes where replies are read: mostly nothing, or replies; now and then no message."""
    kind = draw(st.sampled_from(["nothing"] * 60 + ["replies"] * 140 + ["other JSON", "no JSON", "no message"]))
    if kind == "nothing":
        return []
    if kind == "other JSON":
        return [framed(json.dumps(draw(values)).encode())]
    if kind == "no JSON":
        return [framed(draw(st.one_of(st.binary(max_size=9), st.just(nested(100_000).encode()))))]
    if kind == "no message":
        return [draw(st.binary(max_size=9))]
    found = draw(st.lists(replies, min_size=1, max_size=2))
    return [
        framed(json.dumps({"index": draw(st.sampled_from([index, index, 0])), **reply}).encode()) for reply in found
    ]


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    """Two scorers: of a function that scores a response, and of one that ranks a group."""
    folder = tmp_path_factory.mktemp("functions")
    made = []
    for name, source in (("one.py", SPEAKER), ("group.py", SPEAKER + RANKER)):
        (folder / name).write_text(source)
        made.append(Scorer(Reward(path=str(folder / name), workers=1, timeout_s=1.0, on_error="skip_group")))
    yield made
    for scorer in made:
        scorer.close()


@fuzz
@given(st.data())
def test_replies(scorers, capsys, data):
    """Through a real process, whose function also writes between our replies."""
    scorer = data.draw(st.sampled_from(scorers))
    sent = scorer.pool.threads[0].sent if scorer.pool.threads else 0
    given_to_it = {"value": data.draw(answers), "forged": data.draw(forged(sent + 1))}
    prompt = Prompt(0, (1,), "q", "7", "fuzz", given_to_it)
    tensors = [torch.ones(1, 2, 1, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64)]
    rollout = Rollout(
        [prompt], *tensors, torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), torch.ones(1, 2).bool(), [["a", "b"]]
    )
    found = read_or_refused(lambda: scorer(rollout))
    if found is None:
        return
    assert found.rewards.shape == (1, 2) and bool(found.rewards.isfinite().all())
    for values_of_part in found.parts.values():
        assert values_of_part.shape == (1, 2) and not values_of_part.isinf().any()
    assert all(pred is None or isinstance(pred, str) for group in found.predictions for pred in group)
    assert isinstance(found.first_fault, str)

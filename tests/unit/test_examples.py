"""The files of examples/ run as a user's, without network; a reward model of random weights adds its score."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from repository import ROOT
from transformers import LlamaConfig, LlamaForSequenceClassification

from gspo.config import Reward
from gspo.errors import UserError
from gspo.models.loading import load_tokenizer
from gspo.reward.gold_check import require_gold
from gspo.reward.reward_model import RewardModel
from gspo.reward.scorer import Scorer
from gspo.types import Prompt, Rollout


@contextmanager
def example(name, **settings):
    made = Scorer(Reward(path=str(ROOT / "examples" / name), workers=1, **settings))
    yield made
    made.close()


def prompt(truth, **extra):
    return Prompt(0, (1,), "3 + 4?", truth, "math", extra)


def a_rollout(prompts, texts):
    shape = torch.zeros(len(texts), len(texts[0]))
    return Rollout(
        prompts, shape[..., None].long(), shape.long() + 1, shape[..., None], shape[..., None], shape == 0, texts
    )


def test_dapo_rewards_are_plus_and_minus_one_with_accuracy():
    with example("reward_dapo.py") as scorer:
        texts = ["Answer: 7", r"so \boxed{7}", "Answer: 8", "no idea"]
        scores = scorer.score_texts([prompt("7")], [texts])
        assert scores.rewards.tolist() == [[1, 1, -1, -1]] and scores.parts["acc"].tolist() == [[1, 1, 0, 0]]
        assert scores.predictions == [["7", "7", "8", "[no answer]"]] and scores.faults == 0
        assert require_gold(scorer, [prompt("7"), prompt("8")], 16) == 1.0


def test_code_is_scored_by_the_share_of_tests_that_pass_and_a_loop_costs_its_own_call():
    tests = "assert add(1, 2) == 3\nassert add(0, 5) == 5"
    right, half = ("```python\ndef add(a, b):\n    return " + body + "\n```" for body in ("a + b", "3"))
    loop, broken = "```python\nwhile True: pass\n```", "```python\ndef add(:\n```"
    with example("reward_code.py", timeout_s=1.0) as scorer:
        scores = scorer.score_texts([prompt(tests)], [[right, half, broken, "def add", loop, right]])
    assert scores.rewards.tolist() == [[1, 0.5, 0, 0, 0, 1]] and (scores.timeouts, scores.errors) == (1, 0)


class Judge(BaseHTTPRequestHandler):
    """Fails at first, as a server that starts, then grades 9 where the answer says 7."""

    failures = 2

    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        if Judge.failures > 0:
            Judge.failures -= 1
            self.send_error(503)
            return
        grade = 9 if "answer:\nIt is 7" in text else 2
        reply = json.dumps({"choices": [{"message": {"content": f"I see.\nGrade: {grade}"}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


def test_a_judge_over_http_is_asked_again_where_it_fails():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kwargs = {"url": f"http://127.0.0.1:{server.server_port}/v1", "wait_s": 0.01}
    with example("reward_judge.py", reward_kwargs=kwargs, timeout_s=60.0) as scorer:
        scores = scorer.score_texts([prompt("7", question="3 + 4?")], [["It is 7", "It is 8", "It is 7"]])
    server.shutdown()
    assert scores.first_fault == "" and Judge.failures == 0
    assert scores.rewards.tolist() == [[pytest.approx(x) for x in (0.9, 0.2, 0.9)]]
    assert scores.parts["acc"].tolist() == [[1, 0, 1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model with random weights."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(None)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=1, **sizes)
    path = tmp_path_factory.mktemp("reward_model")
    LlamaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_reward_model_scores_in_the_worker(folder):
    with example("reward_model.py", reward_kwargs={"path": folder}, memory_gib=0.0, timeout_s=120.0) as scorer:
        scores = scorer.score_texts([prompt("7")], [["7", "8", "7"]])
    first, other, again = scores.rewards[0].tolist()
    assert scores.first_fault == "" and first == again != other


def test_a_reward_model_in_batches_scores_as_it_does_alone(folder):
    model = RewardModel(folder)
    texts = [["7", "it is seven, as 3 + 4 = 7", "8" * 300, ""]]
    together = model.score(["3 + 4?"], texts)
    alone = [model.score(["3 + 4?"], [[text]]).item() for text in texts[0]]
    assert together.tolist() == [pytest.approx(alone, abs=1e-5)] and len(set(alone)) == 4


def test_a_reward_models_score_is_added_and_right_stays_what_the_function_says(folder):
    rollout = a_rollout([prompt("7")], [["#### 7", "#### 8"]])
    plain, both = Scorer(Reward(workers=1)), Scorer(Reward(workers=1, model_path=folder, model_weight=10.0))
    judged = both.model.score(["3 + 4?"], rollout.texts)
    scores = both(rollout)
    assert torch.allclose(scores.rewards, plain(rollout).rewards + 10 * judged)
    assert scores.parts["acc"].tolist() == [[1, 0]]
    assert torch.equal(scores.parts["model"].float(), judged) and scores.parts["function"].tolist() == [
        [1.0, pytest.approx(0.1)]
    ]


def test_what_is_no_reward_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"reward.model_path = .* cannot be opened"):
        Scorer(Reward(model_path=str(tmp_path)))

"""A rollout engine is one class and one line of a table."""

import pytest
import torch
from architectures import tiny_model
from tiny_sampler import prompts_of, sampler_for

from gspo.errors import UserError
from gspo.rollout.draw_tokens import Sampling, draw
from gspo.rollout.engine_interface import EngineOptions, Requests, Results
from gspo.rollout.engines import ENGINES, engine_class
from gspo.rollout.tree import Tree


class Uncached:
    """Samples one response after the other by plain forwards of the whole sequence: no more than an engine must do."""

    def __init__(self, model, device, options: EngineOptions):
        self.model = model

    def start(self, requests: Requests) -> "Uncached.Generation":
        return self.Generation(self.model, requests)

    class Generation:
        def __init__(self, model, requests: Requests):
            self.model, self.requests, self.ended = model, requests, 0
            self._results = Results.begin(requests, torch.device("cpu"))

        def run(self, tick):
            for g in range(len(self.requests.prompts)):
                for row in self.requests.rows(g):
                    self.respond(g, row)
                    tick()
                yield g

        def respond(self, g, row):
            requests, out = self.requests, self._results
            ids = [*requests.prompts[g][: requests.seen(g)[row - requests.rows(g).start]]]
            while out.lengths[row] < requests.limits[row] and not out.finished[row]:
                at, key = out.lengths[row : row + 1].clone(), requests.keys[row : row + 1]
                logits = self.model(input_ids=torch.tensor([ids])).logits[:, -1]
                token, out.logprobs[row, at], out.entropy[row, at] = draw(logits, key, at, requests.sampling)
                out.tokens[row, at] = token
                ids.append(int(token))
                out.lengths[row] += 1
                out.finished[row] = bool((token == requests.end_ids).any())
            self.ended += 1

        def progress(self):
            return self.ended, int(self._results.lengths.sum())

        def results(self):
            return self._results


def test_an_engine_of_another_class_samples_the_same_responses(monkeypatch):
    monkeypatch.setitem(ENGINES, "uncached", Uncached)
    limits = torch.tensor([[9, 1, 4], [3, 9, 9]])
    rollouts = [
        sampler_for(tiny_model("llama"), engine=name).generate(
            prompts_of((3, 7)), 3, Sampling(1.2, max_new_tokens=9), limits=limits
        )
        for name in ("paged", "uncached")
    ]
    ours, theirs = rollouts
    assert ours.tokens.equal(theirs.tokens) and ours.texts == theirs.texts
    assert ours.lengths.equal(theirs.lengths) and ours.finished.equal(theirs.finished)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=1e-4, atol=1e-5)


def test_it_grows_the_same_trees(monkeypatch):
    monkeypatch.setitem(ENGINES, "uncached", Uncached)
    ours, theirs = (
        sampler_for(tiny_model("llama"), engine=name).generate(
            prompts_of((3, 7)), 6, Sampling(1.2, max_new_tokens=9), tree=Tree(2, 2, "even", 2)
        )
        for name in ("paged", "uncached")
    )
    assert ours.tokens.equal(theirs.tokens) and ours.lengths.equal(theirs.lengths)
    assert ours.finished.equal(theirs.finished) and ours.copied.equal(theirs.copied) and (ours.copied == 4).any()
    assert ours.prefilled.tolist() == [3, 7] and (theirs.prefilled > ours.prefilled).all(), "which keeps no trunks"
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=1e-4, atol=1e-5)


def test_an_engine_that_is_not_in_the_table_is_the_users_mistake():
    with pytest.raises(UserError, match=r"rollout.engine = 'vllm'.*paged"):
        engine_class("vllm")

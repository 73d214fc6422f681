"""Prompts, and a policy that learns them as batches of them come: for the tests of their order."""

import numpy as np

from gspo.types import Prompt


def some(count):
    return [Prompt(i, (i,), str(i), "", "") for i in range(count)]


class Learner:
    """A policy that answers prompt i rightly with probability p_i, which rises with every group that has contrast; the
    gold answers of some prompts are wrong, so that nothing scores there."""

    def __init__(self, count, wrong, skill=0.0, rate=0.12):
        self.draw, self.skill, self.rate = np.random.default_rng(0), skill, rate
        self.ease = self.draw.normal(-0.4, 1.2, count)
        self.wrong = self.draw.random(count) < wrong

    def chances(self):
        return np.where(self.wrong, 0.0, 1 / (1 + np.exp(-self.ease - self.skill)))

    def train(self, batches, steps, n=4):
        """The curves of some steps, and beside them the truth: the mean chance over all prompts."""
        curves = []
        for _ in range(steps):
            truth, ids = self.chances(), [p.id for p in batches.take()]
            right = self.draw.random((len(ids), n)) < truth[ids, None]
            contrast = right.any(1) & ~right.all(1)
            found = batches.record(contrast, right.mean(1), right.max(1).astype(float))
            curves.append(found | {"truth": truth.mean(), "contrast": contrast.mean(), "wrong": self.wrong[ids].mean()})
            self.skill += self.rate * contrast.mean()
        return {name: np.array([c[name] for c in curves]) for name in curves[0]}

"""Choose the prompts of each batch by what is known of their rewards: a Beta posterior and Thompson sampling."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, from_numpy

from gspo.data.batches import Batches, over_all
from gspo.system.console import say
from gspo.types import Prompt


class BetaBatches(Batches):
    """Hand out the prompts whose responses are most likely to be rewarded unalike; there are no epochs.

    p, the chance that a response to a prompt is right, has the posterior Beta(1 + right, 1 + wrong) of the responses
    seen so far. For each step a p is drawn for every prompt, and those nearest 1/2 are taken: there 1 - p^N - (1 - p)^N
    is largest, the chance of a group with contrast, for every N. A prompt never seen has a uniform p, so that it is
    drawn among the others. What was seen counts half as much after each pass's worth of prompts, because the policy
    changes; so nothing is given up for ever. (MoPPS, arXiv 2507.04632, forgets per group instead.)

    A graded reward counts as a part of a right response. A group without contrast counts as all right or all wrong,
    whichever is nearer, or a prompt that always earns one half would come at every step.
    """

    def __init__(self, prompts: Sequence[Prompt], size: int, seed: int, responses: int):
        super().__init__(prompts, size, seed, spaced=False)
        self.responses, count = responses, len(prompts)
        self.right, self.wrong = np.zeros(count), np.zeros(count)  # [P] responses, as they count by now
        self.mean[:], self.best[:] = np.nan, np.nan  # of each prompt's last group
        self.steps = 0  # so far
        self.kept = 0.5 ** (min(size, count) / count)  # what is left of a count after a step

    def take(self) -> list[Prompt]:
        """Return the next batch."""
        chance = np.random.default_rng([self.seed, self.steps, 1]).beta(1 + self.right, 1 + self.wrong)
        batch = np.abs(chance - 0.5).argsort(kind="stable")[: self.size]
        self.steps += 1
        self.current = np.stack([batch, np.zeros_like(batch)]).astype(np.int32)
        return [self.prompts[i] for i in batch.tolist()]

    def record(self, contrast: Sequence[float], mean: Sequence[float], best: Sequence[float]) -> dict[str, float]:
        """Record what came of the batch taken last, as `Batches.record` does; return the curves about all prompts.

        Prompts that have come enter with their last group, and those of the batch that have not come before speak for
        all others: which of these come first is chance.
        """
        batch, seen, found = self.current[0], ~np.isnan(self.mean), np.array([contrast, mean, best])
        known, first = ~np.isnan(found[1]), ~seen[batch]
        self.right *= self.kept
        self.wrong *= self.kept
        mean = np.clip(found[1], 0, 1)  # rewards may be of another range
        success = np.where(found[0] == 0, mean >= 0.5, mean)[known] * self.responses
        self.right[batch[known]] += success
        self.wrong[batch[known]] += self.responses - success
        curves = {}
        for name, now, last in (("reward_mean", found[1], self.mean), ("reward_max", found[2], self.best)):
            last[batch[known]] = now[known]
            value = over_all(now[first], last[seen], float(seen.mean()))
            curves |= {} if value is None else {name: value}
        return curves

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs to go on in the same order."""
        counts = {"steps": np.array([self.steps]), "right": self.right, "wrong": self.wrong}
        return {**super().state(), **{name: from_numpy(x.copy()) for name, x in counts.items()}}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state, of a run with data.choice=passes with nothing known yet."""
        if "right" not in state:
            return say("data.choice=beta: the checkpoint's run chose otherwise, so nothing is known of any prompt yet.")
        super().load_state(state)
        self.right, self.wrong = state["right"].numpy().copy(), state["wrong"].numpy().copy()
        self.steps = int(state["steps"])

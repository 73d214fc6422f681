"""End a run where a curve has reached what was asked for (`trainer.stop_when`)."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

from gspo.errors import UserError

EXAMPLE = "trainer.stop_when={metric: heldout/accuracy, above: 0.9, patience: 2}"


class StopWhen:
    """A curve, the bound that it is to pass, and for how many measurements in a row.

    Its state follows from the metrics it has seen, so a resumed run that reads those of its earlier steps goes on with
    it. `reached` says what was reached, or nothing.
    """

    def __init__(self, wanted: dict[str, Any], known: Iterable[str]):
        """Read the setting. UserError where it names no known metric, no bound or two, or something else."""
        self.reached, self.streak, self.metric = "", 0, None
        if not wanted:
            return
        self.metric = str(wanted.get("metric"))
        if others := sorted(wanted.keys() - {"metric", "above", "below", "patience"}):
            _refuse(f"{others[0]!r} is no part of it: there are metric, above or below, and patience")
        known = list(known)
        if self.metric not in known and not self.metric.startswith("reward/"):  # a reward function's own curves
            near = difflib.get_close_matches(self.metric, known, n=1, cutoff=0.0)[0]
            _refuse(f"metric = {self.metric!r} is no curve; did you mean {near!r}? docs/metrics.md lists them")
        if ("above" in wanted) == ("below" in wanted):
            _refuse("it needs one bound, above or below")
        self.side = "above" if "above" in wanted else "below"
        self.bound, self.patience = wanted[self.side], wanted.get("patience", 1)
        if isinstance(self.bound, bool) or not isinstance(self.bound, int | float) or not math.isfinite(self.bound):
            _refuse(f"{self.side} = {self.bound!r} is no number")
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            _refuse(f"patience = {self.patience!r} is no number of measurements (1, 2, ...)")

    def observe(self, metrics: dict[str, float]) -> None:
        """Count a step's value, where the step has one."""
        if self.reached or self.metric not in metrics:
            return
        value = metrics[self.metric]
        passed = value > self.bound if self.side == "above" else value < self.bound
        self.streak = self.streak + 1 if passed else 0
        if self.streak == self.patience:
            times = f" {self.patience} times in a row" if self.patience > 1 else ""
            self.reached = f"trainer.stop_when: {self.metric} = {value:.4g} is {self.side} {self.bound:g}{times}"


def _refuse(what: str) -> None:
    raise UserError(f"trainer.stop_when: {what}. For example: {EXAMPLE}.")

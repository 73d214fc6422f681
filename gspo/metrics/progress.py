"""Print how a run goes: a line a step, on a terminal a table with a row a round, and between them held-out results."""

import math
import sys
import time
from collections import defaultdict

from gspo.system.console import LiveTable, say, time_left
from gspo.system.language import translated, word
from gspo.system.time_limit import STARTED

LINE_EVERY_S = 2.0  # least time between the lines of two steps
STEPS_BEFORE_ESTIMATE = 3  # the first is slower than those that follow
# title -> width of the live table's columns, the most asked-for first: a narrow terminal shows those that fit
COLUMNS = {
    **{"round": 5, "step": 9, "left": 10, "reward": 6, "held-out": 8, "no pair": 7, "cut off": 7, "kl": 6},
    **{"ordered": 7, "top": 5, "length": 6, "tok/s": 7},
}


class Progress:
    """Print the lines of a run on its main process. `after_s` is what the evaluation after training is to take."""

    def __init__(self, start_step: int):
        self.start_step = start_step
        self.after_s = 0.0
        self.table: LiveTable | None = None
        self.accuracy = math.nan  # of held-out responses, when they were scored last
        self.round = 0.0  # of the table's last row
        self.last_line = -math.inf
        self.ended: list[float] = []  # when the first few steps ended, and before them when they began

    def begin(self) -> None:
        """Begin to count the time: the first step begins."""
        self.ended = [time.monotonic()]

    def seen(self, row: dict[str, float]) -> None:
        """Take up a step that an earlier start of the run has shown."""
        self.accuracy = row.get("heldout/accuracy", self.accuracy)

    def step(self, step: int, row: dict[str, float], total_steps: int) -> None:
        """Show a step, counted from 1: its line, or its row of the table."""
        if not self.ended:
            self.begin()
        now, left = time.monotonic(), total_steps - step
        pace = (now - self.ended[0]) / (step - self.start_step)
        remaining = pace * left + self.after_s
        if sys.stdout.isatty():
            self._row(step, row, total_steps, remaining)
        elif now - self.last_line >= LINE_EVERY_S or step in (1, total_steps):
            self.last_line = now
            say(step_line(step, row, total_steps, remaining))
        if len(self.ended) <= STEPS_BEFORE_ESTIMATE:
            self.ended.append(now)
            if len(self.ended) > STEPS_BEFORE_ESTIMATE and left:
                self._estimate(now, left)

    def _estimate(self, now: float, left: int) -> None:
        """Say once how long the whole run will take; the first step counts as what it was, not as what steps take."""
        pace = (self.ended[-1] - self.ended[1]) / (len(self.ended) - 2)
        of_a_step = f"{pace:.2g}" if pace < 10 else f"{pace:.0f}"
        total = time_left(now - STARTED + pace * left + self.after_s)
        if self.after_s:
            after = time_left(self.after_s)
            say(f"the whole run takes about {total}: {left} more steps of {of_a_step} s and {after} of evaluation")
        else:
            say(f"the whole run takes about {total}: {left} more steps of {of_a_step} s")

    def looked(self, step: int, row: dict[str, float], best: bool) -> None:
        """Show what a look at the held-out prompts has found, and whether the policy was never better."""
        if "heldout/reward_mean" not in row:
            return
        say(held_out_line(step, row, self.accuracy, best))
        self.accuracy = row.get("heldout/accuracy", self.accuracy)

    def close(self) -> None:
        """Leave the table as it is."""
        if self.table:
            self.table.close()

    def _row(self, step: int, row: dict[str, float], total_steps: int, remaining: float) -> None:
        """Show the step in the live table."""
        self.table = self.table or LiveTable(COLUMNS)
        seen = defaultdict(lambda: math.nan, row)
        cells = {
            "round": f"{row['round'] + 1:.0f}",
            "step": f"{step}/{total_steps}",
            "left": time_left(remaining),
            "reward": f"{seen['reward_mean']:.3f}",
            "held-out": f"{row.get('heldout/accuracy', self.accuracy):.3f}",
            "no pair": f"{seen['pairs/groups_without']:.2f}",
            "cut off": f"{seen['response/cutoff']:.2f}",
            "kl": f"{row['kl_divergence']:.4f}",
            "ordered": _ordered(row),
            "top": f"{seen['reward_max']:.3f}",
            "length": f"{row['response/length_mean']:.1f}",
            "tok/s": f"{seen['tokens_per_second']:.0f}",
        }
        self.table.show(cells, new_row=row["round"] != self.round)
        self.round = row["round"]


def step_line(step: int, row: dict[str, float], total_steps: int, remaining: float) -> str:
    """Return a step's line, in the user's language. `remaining` is in seconds; a step may have no pairs, and no rewards
    where rows hold the responses."""
    seen = defaultdict(lambda: math.nan, row)
    sampled = "tokens_per_second" in row
    if sampled:
        learned = {"reward": f"{seen['reward_mean']:.3f}", "top": f"{seen['reward_max']:.3f}"}
    else:
        learned = {"loss": f"{row['loss/total']:.4f}", "margin": f"{seen['pairs/gap_mean']:.3f}"}
    cut = {"cut off": f"{row['response/cutoff']:.2f}"} if "response/cutoff" in row else {}
    figures = {
        **{"step": f"{step}/{total_steps}", "round": f"{row['round'] + 1:.0f}", **learned},
        **{"no pair": f"{seen['pairs/groups_without']:.2f}", **cut},
        **{"ordered": _ordered(row), "kl": f"{row['kl_divergence']:.4f}"},
        "length": f"{row['response/length_mean']:.1f}",
    }
    speed = [f"{row['tokens_per_second']:.0f} tok/s"] if sampled else []
    speed += [translated(f"{row['time/step']:.2f} s"), f"{word('left')} {translated(time_left(remaining))}"]
    return "  ".join([*(f"{word(name)} {value}" for name, value in figures.items()), *speed])


def _ordered(row: dict[str, float]) -> str:
    """Return the share of pairs that are ordered as their rewards; a dash where there is no pair."""
    return f"{row['preference_accuracy']:.2f}" if "preference_accuracy" in row else "-"


def held_out_line(step: int, row: dict[str, float], accuracy_before: float, best: bool) -> str:
    """Return what a look at the held-out prompts has found. Step 0 is before training.

    `round 1 ends, step 50: held-out accuracy 0.961 (was 0.398), reward 0.950, win rate 0.77 over the policy that began
    the round; the best checkpoint so far`
    """
    where = f"round {row['round'] + 1:.0f} ends, step {step}" if "win_rate" in row else f"step {step}"
    found = []
    if "heldout/accuracy" in row:
        was = "" if math.isnan(accuracy_before) else f" (was {accuracy_before:.3f})"
        found.append(f"accuracy {row['heldout/accuracy']:.3f}{was}")
    found.append(f"reward {row['heldout/reward_mean']:.3f}")
    if "win_rate" in row:
        found.append(f"win rate {row['win_rate']:.2f} over the policy that began the round")
    return f"{where if step else 'before step 1'}: held-out {', '.join(found)}{'; the best checkpoint so far' * best}"

"""Scoring responses with the default reward function or the user's own file.

The function is called by keyword, as the seed and verl do:
`compute_score(data_source=..., solution_str=..., ground_truth=..., extra_info=..., **reward_kwargs)`, plain or async.
It returns a number in [0, 1], or a dict with `score`; its other numbers are logged as `reward/<name>`, and `acc` and
`pred` feed evaluation. A module-level `rank_responses(responses, ground_truth, data_source)` goes before it and scores
a whole group at once.

It runs in processes of its own (worker_pool.py). What it does wrong is counted and told; what a response without a
score gets is `reward.on_error`.
"""

import inspect
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from gspo.config import Reward
from gspo.errors import UserError
from gspo.reward import reward_func
from gspo.reward.worker_pool import GAVE_UP, PATIENCE, Outcome, Pool, Settings
from gspo.system.console import say, track
from gspo.system.torchrun import cpu_cores, is_main, rank
from gspo.types import Prompt, Rollout, Scores

WORTH_HIDING_S = 1e-3  # shorter calls take more from sampling on the same cores than they would later on their own
PATIENCE_AT_START = 4  # calls in a row that may take too long in the check before training
PRINTED_LINES, LINE_WIDTH = 50, 300  # of what the function prints; the rest is dropped


class Scorer:
    """Calls the reward function on every response of a rollout, in parallel."""

    def __init__(self, cfg: Reward):
        self.cfg = cfg
        path = Path(cfg.path).absolute() if cfg.path else Path(reward_func.__file__)
        if not path.is_file():
            what = f"{path} is a folder" if path.is_dir() else f"no such file as {path}"
            raise UserError(f"reward.path = {cfg.path!r}: {what}. It must be a Python file with compute_score.")
        if path.suffix != ".py":
            raise UserError(f"reward.path = {cfg.path!r} is not a Python file (.py).")
        self.path = path
        # The default's components are worth a curve each; compute_score itself returns a number, as the seed says.
        name = cfg.name if cfg.path or cfg.name != "compute_score" else "score_parts"
        settings = Settings(
            str(path),
            name,
            cfg.timeout_s,
            cfg.memory_gib,
            cfg.concurrency,
            groups=bool(cfg.path) and cfg.name == "compute_score",
            default_ranking=inspect.getsource(reward_func.rank_responses),
        )
        self.printed = _Printed()
        self.pool = Pool(settings, cfg.workers or cpu_cores(), self.printed)
        self.name = "rank_responses" if self.pool.ranks else cfg.name
        self.begun: dict[int, list[Future[Outcome]]] = {}
        self.told: set[str] = set()
        self.close = weakref.finalize(self, self.pool.close)

    def begin(self, place: int, prompt: Prompt, texts: list[str]) -> None:
        """Start scoring group `place` of the rollout that is still being sampled, if there is time to be won."""
        if self.pool.call_s > WORTH_HIDING_S:
            self.begun[place] = self._submit(prompt, texts)

    def __call__(self, rollout: Rollout) -> Scores:
        """Wait for what was begun, score the rest. UserError with reward.on_error = stop when a call has a fault."""
        begun, self.begun = self.begun, {}
        skip_groups = self.cfg.on_error == "skip_group"
        return self._collect(rollout.prompts, rollout.texts, begun, rollout.tokens.shape[1], skip_groups, self._tell)

    def score_texts(self, prompts: list[Prompt], texts: list[list[str]]) -> Scores:
        """Score N texts for each of G prompts that no model wrote: rewards [G, N] float32, 0 for faults."""
        self.pool.patience, self.printed.quiet = PATIENCE_AT_START, True
        try:
            return self._collect(prompts, texts, {}, len(texts[0]) if texts else 0, False, lambda *fault: None)
        finally:
            self.pool.patience, self.printed.quiet = PATIENCE, False

    def _submit(self, prompt: Prompt, texts: list[str]) -> "list[Future[Outcome]]":
        given = {"ground_truth": prompt.ground_truth, "data_source": prompt.data_source, **self.cfg.reward_kwargs}
        if not self.pool.ranks or self.pool.takes is None or "extra_info" in self.pool.takes:
            given["extra_info"] = prompt.extra_info
        if self.pool.ranks:
            return [self.pool.submit({"responses": texts, **given})]
        return [self.pool.submit({"solution_str": text, **given}) for text in texts]

    def _collect(
        self,
        prompts: Sequence[Prompt],
        texts: list[list[str]],
        begun: dict[int, Any],
        n: int,
        skip_groups: bool,
        on_fault: Callable[[Outcome, Prompt, list[str]], None],
    ) -> Scores:
        groups = list(zip(prompts, texts, strict=True))
        futures = [begun.get(g) or self._submit(*group) for g, group in enumerate(groups)]
        table = _Table(len(groups), n)
        for g, (prompt, group) in enumerate(track(groups, "scoring")):
            for i, future in enumerate(futures[g]):
                outcome = future.result()
                if outcome.fault:
                    on_fault(outcome, prompt, group if self.pool.ranks else [group[i]])
                table.enter(g, range(len(group)) if self.pool.ranks else [i], outcome)
        return table.scores(skip_groups)

    def _tell(self, outcome: Outcome, prompt: Prompt, texts: list[str]) -> None:
        """Say once what is wrong, with the traceback; or stop."""
        text = (
            f"{self.path}: {self.name} {outcome.said}, on the response {texts[0][:80]!r}"
            f"{f' and {len(texts) - 1} more' if len(texts) > 1 else ''} to the prompt {prompt.text[:80]!r} "
            f"(ground truth {prompt.ground_truth[:40]!r})."
        )
        if outcome.fault == "timeout":
            text += " If it needs longer: reward.timeout_s."
        if self.cfg.on_error == "stop" or outcome.kind == GAVE_UP:
            raise UserError(text)
        if outcome.kind in self.told:
            return
        self.told.add(outcome.kind)
        effect = {"zero": "it scores 0", "skip_group": "its group is left out"}[self.cfg.on_error]
        where = "" if is_main() else f"rank {rank()}: "
        trace = f"\n{outcome.trace.rstrip()}" if outcome.trace else ""
        note = f"({effect}, reward.on_error; told once, counted in reward/{outcome.fault}s)"
        print(f"{where}warning: {text} {note}{trace}", file=sys.stderr, flush=True)


class _Table:
    """Outcomes -> Scores."""

    def __init__(self, g: int, n: int):
        self.rewards, self.faulty = torch.zeros(g, n), torch.zeros(g, n, dtype=torch.bool)
        self.parts: dict[str, torch.Tensor] = {}
        self.predictions: list[list[str | None]] = [[None] * n for _ in range(g)]
        self.counts, self.first_fault = {"calls": 0, "errors": 0, "timeouts": 0}, ""

    def enter(self, g: int, places: Any, outcome: Outcome) -> None:
        self.counts["calls"] += 1
        if outcome.fault:
            self.first_fault = self.first_fault or outcome.said
            self.counts[f"{outcome.fault}s"] += 1
            self.faulty[g, list(places)] = True
            return
        if "scores" in outcome.reply:
            self.rewards[g] = torch.tensor(outcome.reply["scores"])
            return
        (i,) = places
        self.rewards[g, i] = outcome.reply["score"]
        self.predictions[g][i] = outcome.reply["pred"]
        for name, value in outcome.reply["parts"].items():
            if name not in self.parts:
                self.parts[name] = torch.full_like(self.rewards, torch.nan)
            self.parts[name][g, i] = value

    def scores(self, skip_groups: bool) -> Scores:
        # All rewards of a group alike is what no objective learns from.
        skipped = self.faulty.any(1).nonzero().flatten().tolist() if skip_groups else []
        self.rewards[skipped] = 0.0
        parts = dict(sorted(self.parts.items()))
        return Scores(self.rewards, parts, self.predictions, skipped, self.first_fault, **self.counts)


class _Printed:
    """Shows the first lines of what a reward function prints."""

    def __init__(self) -> None:
        self.left, self.part, self.quiet = PRINTED_LINES, "", False

    def __call__(self, text: str) -> None:
        if self.left <= 0 or self.quiet:
            return
        lines = (self.part + text[: PRINTED_LINES * LINE_WIDTH]).split("\n")
        self.part = lines.pop()[:LINE_WIDTH]
        for line in lines[: self.left]:
            say(f"reward function: {line[:LINE_WIDTH]}")
        self.left -= len(lines)
        if self.left <= 0:
            say(f"reward function: (it prints more than {PRINTED_LINES} lines; the rest is not shown)")

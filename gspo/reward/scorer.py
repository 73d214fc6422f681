"""Score responses with the default reward function or the one in the user's file.

The function is called by keyword, as in the original description and in verl:
`compute_score(data_source=..., solution_str=..., ground_truth=..., extra_info=..., **reward_kwargs)`, plain or async;
it is given those of them that it takes, and must take the response.
It returns a finite number, or a dict with `score`; its other numbers are logged as `reward/<name>`, and `acc` and
`pred` feed evaluation. Where the file defines `rank_responses(responses, ground_truth, data_source)`, that is called
instead, once for a whole group.

It runs in worker processes (worker_pool.py). Its faults are counted and reported; `reward.on_error` says what a
response without a score gets.
"""

import contextlib
import functools
import inspect
import math
import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gspo.config import Reward
from gspo.errors import UserError
from gspo.reward import reward_func
from gspo.reward.worker_handle import Outcome, Settings, withheld
from gspo.reward.worker_main import trl_answer
from gspo.reward.worker_pool import GAVE_UP, MOST_TIMEOUTS, WorkerPool
from gspo.system.console import say, track
from gspo.system.output import printable
from gspo.system.torchrun import cpu_cores, is_main, rank
from gspo.types import Prompt, Rollout, Scores

if TYPE_CHECKING:
    from gspo.reward.reward_model import RewardModel

WORTH_OVERLAPPING_S = 1e-3  # shorter calls slow down sampling, on the same cores, by more than they take afterwards
MOST_TIMEOUTS_BEFORE_TRAINING = 4  # in a row, in the check before training
MOST_DEATHS_BEFORE_TRAINING = 3  # calls in a row that end their process; each costs two starts of one
# Below reward/, as the parts of a score are.
OUR_CURVES = ("errors", "timeouts", "faults", "batch_mean", "batch_max", "function", "model")
WATCH_S = 60.0  # of waiting for one call, after which a line says what is waited for
PRINTED_LINES, LINE_WIDTH = 50, 300  # shown of what the function prints


class Scorer:
    """Call the reward function on every response of a rollout, in parallel."""

    def __init__(self, cfg: Reward, device: torch.device | str = "cpu", ranks: bool = True):
        """Start the first process, open the reward model on `device`. With `ranks`, `rank_responses` goes first."""
        self.cfg, self.device = cfg, device
        if cfg.range and (len(cfg.range) != 2 or not cfg.range[0] < cfg.range[1]):
            raise UserError(f"reward.range = {cfg.range}: it is [lowest, highest], for example [-1, 1].")
        # A response is right from this reward on; the check before training may raise it (gold_check.py).
        self.is_told = cfg.correct_at is not None or bool(cfg.range)
        self.correct_at = cfg.correct_at if cfg.correct_at is not None else cfg.range[1] if cfg.range else 1.0
        path = Path(cfg.path).absolute() if cfg.path else Path(reward_func.__file__)
        if not path.is_file():
            what = f"{path} is a folder" if path.is_dir() else f"no such file as {path}"
            what = f"{path} is a pipe or a device" if path.exists() and not path.is_dir() else what
            raise UserError(f"reward.path = {cfg.path!r}: {what}. It must be a Python file with compute_score.")
        if path.suffix != ".py":
            raise UserError(f"reward.path = {cfg.path!r} is not a Python file (.py).")
        self.path = path
        self._check_environment()
        # The default's components get a curve each; compute_score itself returns a number, as the description asks.
        name = cfg.name if cfg.path or cfg.name != "compute_score" else "score_parts"
        settings = Settings(
            str(path),
            name,
            cfg.timeout_s,
            cfg.memory_gib,
            cfg.concurrency,
            env=tuple(cfg.env),
            allow_ranking=ranks and bool(cfg.path) and cfg.name == "compute_score",
            default_ranking=inspect.getsource(reward_func.rank_responses),
            range=tuple(cfg.range),
        )
        self.printed = _PrintedLines()
        self.pool = WorkerPool(settings, cfg.workers or cpu_cores(), self.printed)
        self.name = "rank_responses" if self.pool.scores_groups else cfg.name
        self._check_keywords()
        self.begun: dict[int, list[Future[Outcome]]] = {}  # place of a group -> its calls
        self.warned: set[str] = set()  # kinds of faults
        self.close = weakref.finalize(self, self.pool.close)
        self.model = self._open_model()

    def _check_environment(self) -> None:
        """Say which secrets of the environment the user's function does not get. Raise UserError for missing names."""
        for name in self.cfg.env:
            if name not in os.environ:
                raise UserError(
                    f"reward.env names {name!r}, which is not set in the environment: export it, or drop it."
                )
        if self.cfg.path and (hidden := withheld(self.cfg.env)):
            names = ", ".join(hidden)
            say(f"note: the reward function does not get {names}; name in reward.env what it needs of these.")

    def _check_keywords(self) -> None:
        """Raise UserError where the function does not take what it would be given, or needs what it is not."""
        takes, kwargs, what = self.pool.keywords, self.cfg.reward_kwargs, f"{self.name} of {self.path}"
        if self.pool.scores_groups:
            given = ("responses", "ground_truth", "data_source")  # and extra_info where it takes that
        else:
            given = ("data_source", "solution_str", "ground_truth", "extra_info")
        only = "" if takes is None else f"takes {', '.join(takes) or 'no keywords'} only"
        for key in kwargs:
            if key in (*given, "extra_info"):
                raise UserError(f"reward.reward_kwargs sets {key!r}, which every call is given already. Rename it.")
            if takes is not None and key not in takes:
                raise UserError(
                    f"reward.reward_kwargs sets {key!r}, but {what} {only}. Add it to the function, or leave it out."
                )
        if "completions" in self.pool.required:
            raise UserError(f"{self.path}: {trl_answer(self.name, self.pool.required, self.name != 'compute_score')}")
        response = "responses" if self.pool.scores_groups else "solution_str"
        if takes is not None and response not in takes:
            raise UserError(
                f"{what} is called by name with those of {', '.join(given)} that it takes, but {only}, so it does not "
                f"see the response. Rename that argument to {response!r}."
            )
        for key in self.pool.required:
            if key not in (*given, "extra_info", *kwargs):
                raise UserError(
                    f"{what} needs {key!r}, but is called with {', '.join(given)}. Give it a default, or set "
                    f"reward.reward_kwargs.{key}=VALUE."
                )

    @property
    def ranks(self) -> bool:
        """Return whether rewards compare within a group, by `rank_responses`: its best is not right by that."""
        return self.pool.scores_groups

    @functools.cached_property
    def of_each(self) -> "Scorer":
        """Return what scores a response by itself, for evaluation: where the file has both `rank_responses` and
        `compute_score`, a scorer that calls the latter; else this one."""
        if not (self.pool.scores_groups and self.pool.has_function):
            return self
        say(f"note: accuracy is by compute_score of {self.path}, as rank_responses compares within a group")
        return Scorer(self.cfg, self.device, ranks=False)

    @property
    def title(self) -> str:
        """Return the file and the function in it, for messages."""
        return f"{self.cfg.path or f'the default, {os.path.relpath(self.path)}'}: {self.name}"

    def begin(self, place: int, prompt: Prompt, texts: list[str], reasons: list[str]) -> None:
        """Start scoring group `place` while others are still being sampled, if calls are long enough to gain by it."""
        if self.pool.mean_call_s > WORTH_OVERLAPPING_S:
            self.begun[place] = self._submit(prompt, texts, reasons)

    def __call__(self, rollout: Rollout) -> Scores:
        """Score every response, but those begun already. Raise UserError at a fault where reward.on_error = stop."""
        begun, self.begun = self.begun, {}
        skip_groups = self.cfg.on_error == "skip_group"
        reasons, n = rollout.finish_reasons, rollout.tokens.shape[1]
        scores = self._collect(rollout.prompts, rollout.texts, reasons, begun, n, skip_groups, self._warn)
        return self._with_model(scores, rollout) if self.model and rollout.prompts else scores

    def _open_model(self) -> "RewardModel | None":
        """Open the reward model, if there is one. Raise UserError where that fails."""
        if not self.cfg.model_path:
            return None
        from gspo.reward.reward_model import RewardModel  # with transformers' classes, which few runs need

        return RewardModel(self.cfg.model_path, self.device)

    def _with_model(self, scores: Scores, rollout: Rollout) -> Scores:
        """Return the scores with the reward model's added; right is what the function alone says is right."""
        judged = self.model.score([prompt.text for prompt in rollout.prompts], rollout.texts)
        right = scores.rewards >= self.correct_at - 1e-6 * abs(self.correct_at)
        acc = scores.parts.get("acc", torch.full_like(scores.rewards, torch.nan, dtype=torch.float64))
        acc = acc if self.ranks else torch.where(acc.isnan(), right.double(), acc)
        rewards = scores.rewards + self.cfg.model_weight * judged
        rewards[scores.skipped] = 0.0
        parts = {**scores.parts, "acc": acc, "function": scores.rewards.double(), "model": judged.double()}
        return replace(scores, rewards=rewards, parts=dict(sorted(parts.items())))

    def score_texts(self, prompts: list[Prompt], texts: list[list[str]]) -> Scores:
        """Score N given texts for each of G prompts: rewards [G, N] float32, 0 for faults, without warnings."""
        self.pool.most_timeouts, self.printed.quiet = MOST_TIMEOUTS_BEFORE_TRAINING, True
        self.pool.most_deaths = MOST_DEATHS_BEFORE_TRAINING
        try:
            reasons, n = [["stop"] * len(group) for group in texts], len(texts[0]) if texts else 0
            return self._collect(prompts, texts, reasons, {}, n, False, lambda *fault: None)
        finally:
            self.pool.most_timeouts, self.pool.most_deaths, self.printed.quiet = MOST_TIMEOUTS, math.inf, False

    def _taken(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return those of the arguments that the function takes."""
        takes = self.pool.keywords
        return given if takes is None else {name: value for name, value in given.items() if name in takes}

    def _submit(self, prompt: Prompt, texts: list[str], reasons: list[str]) -> "list[Future[Outcome]]":
        """Queue the calls for a group: one for each response, or one for all."""
        given = {"ground_truth": prompt.ground_truth, "data_source": prompt.data_source, **self.cfg.reward_kwargs}
        if self.pool.scores_groups:
            info = {"finish_reasons": reasons, **prompt.extra_info}
            return [self.pool.submit(self._taken({"responses": texts, **given, "extra_info": info}))]
        infos = [{"finish_reason": reason, **prompt.extra_info} for reason in reasons]
        return [
            self.pool.submit(self._taken({"solution_str": text, **given, "extra_info": info}))
            for text, info in zip(texts, infos, strict=True)
        ]

    def _collect(
        self,
        prompts: Sequence[Prompt],
        texts: list[list[str]],
        reasons: list[list[str]],
        begun: dict[int, Any],
        n: int,
        skip_groups: bool,
        on_fault: Callable[[Outcome, Prompt, list[str]], None],
    ) -> Scores:
        """Wait for the outcomes of all groups, those in `begun` and the others."""
        groups = list(zip(prompts, texts, strict=True))
        futures = [
            begun.get(g) or self._submit(*group, why)
            for g, (group, why) in enumerate(zip(groups, reasons, strict=True))
        ]
        table = _ScoreTable(len(groups), n, self.cfg.range)
        for g, (prompt, group) in enumerate(track(groups, "scoring")):
            for i, future in enumerate(futures[g]):
                outcome = self._wait(future, prompt, group if self.pool.scores_groups else group[i:])
                if len(outcome.reply.get("scores", group)) != len(group):  # not written by our code in the worker
                    outcome = Outcome(fault="error", kind="garbled", message="sent scores of another group's size")
                called = group if self.pool.scores_groups else [group[i]]
                if outcome.fault:
                    on_fault(outcome, prompt, called)
                table.enter(g, range(len(group)) if self.pool.scores_groups else [i], outcome, _call(called, prompt))
        return table.scores(skip_groups)

    def _wait(self, future: "Future[Outcome]", prompt: Prompt, texts: list[str]) -> Outcome:
        """Wait for the outcome of a call; say every minute what is waited for."""
        began = time.monotonic()
        while not wait([future], WATCH_S).done:
            where = "" if is_main() else f"rank {rank()}: "
            text = (
                f"{where}has waited {time.monotonic() - began:.0f} s for {self.title}, on the response "
                f"{texts[0][:80]!r} to the prompt {prompt.text[:80]!r}; {len(self.pool.queue)} calls wait behind it. "
                f"A call is ended after reward.timeout_s = {self.cfg.timeout_s:g} s; Ctrl-C ends the run."
            )
            with contextlib.suppress(OSError):
                print(printable(text), file=sys.stderr, flush=True)
        return future.result()

    def _warn(self, outcome: Outcome, prompt: Prompt, texts: list[str]) -> None:
        """Warn of the first fault of each kind, with the traceback. Raise UserError where the run is to stop."""
        text = f"{self.path}: {self.name} {outcome.message}, {_call(texts, prompt)}."
        if outcome.fault == "timeout":
            text += " If it needs longer, raise reward.timeout_s."
        if self.cfg.on_error == "stop" or outcome.kind == GAVE_UP:
            raise UserError(text)
        if outcome.kind in self.warned:
            return
        self.warned.add(outcome.kind)
        lowest = f"it scores {self.cfg.range[0]:g}" if self.cfg.range else "it scores 0, or the lowest below that"
        effect = {"zero": lowest, "skip_group": "its group is left out"}[self.cfg.on_error]
        where = "" if is_main() else f"rank {rank()}: "
        trace = f"\n{outcome.trace.rstrip()}" if outcome.trace else ""
        note = f"({effect}, reward.on_error; further ones are only counted, in reward/{outcome.fault}s)"
        print(printable(f"{where}warning: {text} {note}{trace}"), file=sys.stderr, flush=True)


def _call(texts: list[str], prompt: Prompt) -> str:
    """Return words for a call: its response, prompt and ground truth."""
    more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
    asked = f"to the prompt {prompt.text[:80]!r} (ground truth {prompt.ground_truth!r:.42})"
    return f"on the response {texts[0][:80]!r}{more} {asked}"


def _part_name(name: str) -> str:
    """Return the name of the curve of a score's part: `reward/errors` is ours, so its `errors` is `own_errors`."""
    bare = name
    while bare.startswith("own_"):
        bare = bare.removeprefix("own_")
    return f"own_{name}" if bare in OUR_CURVES else name


class _ScoreTable:
    """Collect outcomes as Scores of G groups of N responses."""

    def __init__(self, g: int, n: int, limits: Sequence[float]):
        self.limits = limits
        self.rewards, self.faulty = torch.zeros(g, n), torch.zeros(g, n, dtype=torch.bool)
        self.parts: dict[str, torch.Tensor] = {}
        self.predictions: list[list[str | None]] = [[None] * n for _ in range(g)]
        self.counts, self.first_fault = {"calls": 0, "errors": 0, "timeouts": 0}, ""

    def enter(self, g: int, places: Any, outcome: Outcome, call: str) -> None:
        """Enter the outcome of a call, as `call` describes it, for some responses of group `g`."""
        self.counts["calls"] += 1
        if outcome.fault:
            self.first_fault = self.first_fault or f"{outcome.message}, {call}"
            self.counts[f"{outcome.fault}s"] += 1
            self.faulty[g, list(places)] = True
            return
        for i, reply in zip(places, outcome.reply.get("scores", [outcome.reply]), strict=True):
            self.rewards[g, i] = reply["score"]
            self.predictions[g][i] = reply["pred"]
            for name, value in reply["parts"].items():
                name = _part_name(name)
                if name not in self.parts:
                    self.parts[name] = torch.full_like(self.rewards, torch.nan, dtype=torch.float64)
                self.parts[name][g, i] = value if math.isfinite(value) else math.nan

    def scores(self, skip_groups: bool) -> Scores:
        """Return the scores; with `skip_groups`, a group with a fault scores 0: nothing is learned from it.

        Otherwise a faulty call scores the lowest reward of reward.range, or 0, or what is the lowest here: a response
        on which the function fails never beats one that it scores.
        """
        skipped = self.faulty.any(1).nonzero().flatten().tolist() if skip_groups else []
        lowest = self.limits[0] if self.limits else float(self.rewards.min()) if self.rewards.numel() else 0.0
        self.rewards[self.faulty] = lowest  # unscored ones are 0 so far
        self.rewards[skipped] = 0.0
        parts = dict(sorted(self.parts.items()))
        faulty = self.faulty if self.faulty.any() else None
        return Scores(self.rewards, parts, self.predictions, skipped, self.first_fault, **self.counts, faulty=faulty)


class _PrintedLines:
    """Show the first lines of what a reward function prints."""

    def __init__(self) -> None:
        self.left, self.part, self.quiet = PRINTED_LINES, "", False

    def __call__(self, text: str) -> None:
        if self.left <= 0 or self.quiet:
            return
        lines = (self.part + text[: PRINTED_LINES * LINE_WIDTH]).split("\n")
        self.part = lines.pop()[:LINE_WIDTH]
        for line in lines[: self.left]:
            say(f"reward function: {printable(line[:LINE_WIDTH])}")
        self.left -= len(lines)
        if self.left <= 0:
            say(f"reward function: (it prints more than {PRINTED_LINES} lines; the rest is not shown)")

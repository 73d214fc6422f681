"""Scoring responses with the default reward function or the user's own file.

The function is called by keyword, as the seed and verl do:
`compute_score(data_source=..., solution_str=..., ground_truth=..., extra_info=..., **reward_kwargs)`.
It returns a number in [0, 1], or a dict with `score` whose other numbers are logged as `reward/<name>`.
"""

import contextlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gspo import reward_func
from gspo.config import Reward
from gspo.errors import UserError
from gspo.progress import track
from gspo.types import Prompt, Rollout, Scores


def load_module(path: Path) -> ModuleType:
    """Import the user's file; UserError when it is missing or does not import."""
    if not path.is_file():
        raise UserError(f"reward.path = {str(path)!r}: no such file. It must be a Python file with compute_score.")
    spec = importlib.util.spec_from_file_location(f"user_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"reward.path = {str(path)!r} is not a Python file (.py).")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise UserError(f"{path} does not import: {_where(e, path)}.") from e
    return module


def _where(error: BaseException, path: Path) -> str:
    """`KeyError: 'x' (line 12)`: the error and the line of the user's file it came through."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path.absolute()):
            line = trace.tb_lineno
        trace = trace.tb_next
    if line is None and isinstance(error, SyntaxError):
        line = error.lineno
    return f"{type(error).__name__}: {error}" + (f" (line {line})" if line else "")


def _number(value: Any) -> float | None:
    """A number of Python, numpy or torch as a float; None for anything else."""
    with contextlib.suppress(Exception):  # an array of several has no item(), 10**400 is no float
        value = value.item() if hasattr(value, "item") else value
        return float(value) if isinstance(value, int | float) else None
    return None


class Scorer:
    """Calls the reward function on every response of a rollout."""

    def __init__(self, cfg: Reward):
        self.path = Path(cfg.path) if cfg.path else Path(reward_func.__file__)
        module = load_module(self.path) if cfg.path else reward_func
        self.function: Callable[..., Any] = getattr(module, cfg.name, None)
        self.kwargs = cfg.reward_kwargs
        if not callable(self.function):
            raise UserError(f"{self.path} has no function {cfg.name!r}; write one or set reward.name.")
        self.name = cfg.name

    def __call__(self, rollout: Rollout) -> Scores:
        """-> rewards [G, N] float32 on the CPU. UserError when the function raises or returns no number in [0, 1]."""
        rewards, parts = [], []
        for prompt, texts in track(list(zip(rollout.prompts, rollout.texts, strict=True)), "scoring"):
            for text in texts:
                score, extra = self.score(prompt, text)
                rewards.append(score)
                parts.append(extra)
        shape = (len(rollout.prompts), rollout.tokens.shape[1])
        names = sorted({name for extra in parts for name in extra})
        table = {name: torch.tensor([e.get(name, math.nan) for e in parts]).view(shape) for name in names}
        return Scores(torch.tensor(rewards, dtype=torch.float32).view(shape), table)

    def score(self, prompt: Prompt, text: str) -> tuple[float, dict[str, float]]:
        """One response -> (score in [0, 1], further numbers)."""
        try:
            value = self.function(
                data_source=prompt.data_source,
                solution_str=text,
                ground_truth=prompt.ground_truth,
                extra_info=prompt.extra_info,
                **self.kwargs,
            )
        except Exception as e:
            raise UserError(
                f"{self.path}: {self.name} raised {_where(e, self.path)} on the response {text[:80]!r} "
                f"to the prompt {prompt.text[:80]!r} (ground truth {prompt.ground_truth[:40]!r})."
            ) from e
        extra: dict[str, float] = {}
        score = value
        if isinstance(value, dict):
            extra = {k: x for k, v in value.items() if k != "score" and (x := _number(v)) is not None}
            score = value.get("score")
        number = _number(score)
        if number is not None and 0.0 <= number <= 1.0:
            return number, extra
        raise UserError(
            f"{self.path}: {self.name} returned {value!r:.60} for the response {text[:80]!r}; "
            "it must return a number from 0 to 1, or a dict whose 'score' is one."
        )

"""Keep a run's evaluations (eval_before.json, eval_after.json) with the step and the settings that they belong to, and
beside each its answers (eval_before_answers.jsonl)."""

import contextlib
import json
from pathlib import Path
from typing import Any

from gspo.checkpoint.fingerprints import of_source
from gspo.distributed.world import World
from gspo.system.files import remove, write_json, write_json_lines

NAMES = ("eval_before", "eval_after")
WORDS = {
    "rows": "prompts",
    "n": "numbers of samples (eval.n)",
    "reward_function": "reward functions",
}  # of `settings_of`, in a message


def settings_of(n: int, rows: str, reward_function: str) -> dict[str, Any]:
    """Return what two evaluations must share for their numbers to be compared, of all that a run may change.

    `rows` is the fingerprint of the test prompts, `reward_function` its source.
    """
    return {"rows": rows, "n": n, "reward_function": of_source(reward_function)}


def answers_file(folder: Path, name: str) -> Path:
    """Return the file of an evaluation's answers."""
    return folder / f"{name}_answers.jsonl"


def write_evaluation(
    folder: Path, name: str, step: int, settings: dict[str, Any], report: dict[str, Any], answers: list[dict[str, Any]]
) -> None:
    """Write an evaluation's answers, and its report to `<name>.json`. OSError where that fails."""
    write_json_lines(answers_file(folder, name), ({"step": step, **row} for row in answers))
    write_json(folder / f"{name}.json", {"step": step, "settings": settings, **report})


def read_evaluation(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the evaluation in `<name>.json`; None where there is none, or the file does not hold a whole one."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        file = folder / f"{name}.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None  # a pipe would be waited for
        parts = {"step": int, "settings": dict, "prompts": int, "samples": int, "interval": dict}
        if isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in parts.items()):
            return found
    return None


def needs_evaluation(folder: Path, name: str, step: int, settings: dict[str, Any], world: World) -> bool:
    """Return whether an evaluation of this step by these settings is missing. All ranks call it together."""

    def missing() -> bool:
        found = read_evaluation(folder, name)
        return found is None or (found["step"], found["settings"]) != (step, settings)

    return world.broadcast_from_main(missing)


def remove_evaluations(folder: Path) -> None:
    """Remove what an earlier attempt evaluated: a run that begins anew has evaluated nothing."""
    for name in NAMES:
        remove(folder / f"{name}.json")
        remove(answers_file(folder, name))


def comparable_evaluations(folder: Path, step: int) -> tuple[dict[str, dict[str, Any]], str]:
    """Return ({"before": ..., "after": ...} that may stand side by side, why one of them is left out or "")."""
    before, after = (read_evaluation(folder, name) for name in NAMES)
    if after and after["step"] != step:
        note = f"eval_after.json is of step {after['step']}, this is step {step}: it is not shown."
        return ({"before": before} if before else {}), note
    if before and after and (other := [k for k in WORDS if before["settings"].get(k) != after["settings"].get(k)]):
        words = " and ".join(WORDS[key] for key in other)
        return {"after": after}, f"eval_before.json is not shown: before and after are of different {words}."
    return {name: report for name, report in (("before", before), ("after", after)) if report}, ""


def figure(report: dict[str, Any], metric: str) -> str | None:
    """Return a metric of an evaluation with its interval, `0.500 [0.400, 0.600]`; None where it has no such numbers."""
    try:
        low, high = report["interval"][metric]
        return f"{report[metric]:.3f} [{low:.3f}, {high:.3f}]"
    except (KeyError, TypeError, ValueError, OverflowError):
        return None

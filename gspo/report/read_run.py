"""Read a run's folder for its page: settings, curves, evaluations and samples, as small as the page can show them."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from gspo.checkpoint.evaluations import NAMES, comparable_evaluations, read_evaluation
from gspo.config import Config, Health, flatten
from gspo.errors import UserError
from gspo.system.output import CONTROLS, printable

MOST_POINTS = 1000  # of a curve: a panel is some hundred pixels wide
MOST_CHARACTERS = 24_000_000  # of all samples on a page, which a browser opens in a second
_ODD = re.compile("[" + "".join(map(re.escape, map(chr, CONTROLS))) + "\ud800-\udfff]")
SECTIONS = {f.name for f in fields(Config)}

Curve = tuple[list[int], list[float | None]]  # steps, values; None where a value is not finite


@dataclass
class RunPage:
    """What the page shows of a run. All texts are free of control characters."""

    name: str
    folder: str
    last_step: int
    settings: dict[str, str]  # parameter -> value, as text
    health: Health  # the limits of the run's own configuration
    right_at: float  # a response of at least this reward is right
    rounds: list[tuple[int, int]]  # (first step, round from 1)
    curves: dict[str, Curve]
    tables: dict[str, dict[str, dict[str, Any]]]  # data source, or "" for all -> {"before": ..., "after": ...}
    prompts: list[str]
    samples: list[list[Any]]  # [step, place in prompts, ground truth, [[text, reward, times]], chosen, rejected]
    notes: list[str]


def read_run(folder: Path) -> RunPage:
    """Read a run's folder. UserError where it holds no steps, is damaged, or was not written by this program."""
    notes: list[str] = []
    rows = read_steps(folder, notes)
    settings, health, right_at = read_settings(folder / "config.yaml")
    last_step = rows[-1]["step"]
    prompts, samples = compact(read_lines(folder / "samples.jsonl", is_group, notes))
    return RunPage(
        name=shown(folder.name),
        folder=shown(str(folder)),
        last_step=last_step,
        settings=settings,
        health=health,
        right_at=right_at,
        rounds=_rounds(rows),
        curves=curves_of(rows),
        tables=_tables(folder, last_step, notes),
        prompts=prompts,
        samples=samples,
        notes=notes,
    )


def read_steps(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, at least one. UserError where the folder holds none."""
    if not (folder / "metrics.jsonl").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
        cure = f"Name one of the runs in it: {', '.join(inside[:5])}." if inside else "Name a run, as outputs/quick."
        raise UserError(f"{folder} is not a run's folder: there is no metrics.jsonl in it. {cure}")
    rows = read_lines(folder / "metrics.jsonl", is_step, notes)
    if not rows:
        raise UserError(f"{folder} holds no steps yet (metrics.jsonl is empty). Wait for its first step.")
    return rows


def shown(text: str) -> str:
    """Return a text with control characters, and halves of characters, written out."""
    return printable(text.encode("utf-8", "backslashreplace").decode("utf-8")) if _ODD.search(text) else text


def read_lines(path: Path, is_ours: Callable[[Any], bool], notes: list[str]) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file, none where there is no file. UserError at a damaged line.

    A last line without its end is of a run that is writing it, or was ended there: it is left out, and noted.
    """
    if not path.is_file():  # a pipe would be waited for
        return []
    try:
        *lines, unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}.") from e
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(
                f"{path}, line {number} is damaged: {shown(line[:60])!r} is no JSON. Remove the line, or start the "
                "run's command again: it repairs the file while it resumes."
            ) from e
        if not is_ours(row):
            raise UserError(
                f"{path}, line {number} was not written by this version: {shown(line[:60])!r} is not as "
                "docs/outputs.md describes the file. Read the run with the version that trained it."
            )
        rows.append(row)
    if unfinished:
        notes.append(f"{path.name}: its last line is not finished and is left out")
    return rows


def _is_number(value: Any) -> bool:
    """Return whether a value of a JSON file is a number that a float can hold."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value)


def is_step(row: Any) -> bool:
    """Return whether an object is a line of metrics.jsonl."""
    return (
        isinstance(row, dict)
        and _is_count(row.get("step"))
        and "round" in row
        and all(_is_number(value) for value in row.values())
    )


def is_group(row: Any) -> bool:
    """Return whether an object is a line of samples.jsonl."""
    if not isinstance(row, dict) or not _is_count(row.get("step")) or not isinstance(row.get("prompt"), str):
        return False
    texts, rewards = row.get("responses"), row.get("rewards")
    return (
        isinstance(texts, list)
        and isinstance(rewards, list)
        and len(texts) == len(rewards)
        and all(isinstance(text, str) for text in texts)
        and all(_is_number(reward) for reward in rewards)
    )


def read_settings(path: Path) -> tuple[dict[str, str], Health, float]:
    """Return config.yaml's parameters as texts, its limits of health (by their defaults where it lacks some), and the
    reward from which on a response is right: reward.correct_at, else the top of reward.range, else 1."""
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise yaml.YAMLError("aliases, which a run never writes, can stand for texts of any size")
        tree = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is no YAML"
        raise UserError(f"{path} cannot be read: {why}. A run writes it when it starts; put it back.") from e
    if not isinstance(tree, dict) or not SECTIONS & tree.keys() or not all(isinstance(v, dict) for v in tree.values()):
        raise UserError(
            f"{path} was not written by this version: it has no sections such as model, rollout and trainer. Read the "
            "run with the version that trained it."
        )
    known = {f.name for f in fields(Health)}
    limits = {name: value for name, value in tree.get("health", {}).items() if name in known}
    reward = tree.get("reward", {})
    stated = [reward.get("correct_at"), *(reward.get("range") or [])[1:]]
    right_at = next((float(value) for value in stated if _is_number(value)), 1.0)
    return {shown(str(name)): setting_text(value) for name, value in flatten(tree).items()}, Health(**limits), right_at


def setting_text(value: Any) -> str:
    """Return a parameter's value as it would be typed."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return shown(text)


def _rounds(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Return (first step, round from 1) of every round."""
    found: list[tuple[int, int]] = []
    for row in rows:
        number = int(row["round"]) + 1
        if not found or found[-1][1] != number:
            found.append((row["step"], number))
    return found


def curves_of(rows: list[dict[str, Any]]) -> dict[str, Curve]:
    """Return every metric's curve, in the order in which the metrics appear, at most MOST_POINTS each."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                points.setdefault(shown(name), []).append((row["step"], value))
    return {name: thinned(found) for name, found in points.items()}


def thinned(points: list[tuple[int, float]], most: int = MOST_POINTS) -> Curve:
    """Return steps and values of at most `most` points: means over neighbours, at the last step of each."""
    size = math.ceil(len(points) / most)
    steps, values = [], []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        finite = [value for _, value in part if math.isfinite(value)]
        steps.append(part[-1][0])
        values.append(float(f"{sum(finite) / len(finite):.5g}") if finite else None)
    return steps, values


def _tables(folder: Path, last_step: int, notes: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the evaluations that may stand side by side: over all prompts, and by data source where there are several.

    UserError where a file of one is damaged.
    """
    for name in NAMES:
        if (folder / f"{name}.json").exists() and not _is_whole(read_evaluation(folder, name)):
            raise UserError(
                f"{folder / name}.json is damaged or of another version. Remove it; `python eval.py {folder}` measures "
                "the run's newest checkpoint again."
            )
    reports, note = comparable_evaluations(folder, last_step)
    notes += [note] if note else []
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for when, report in reports.items():
        for source, part in _parts(report).items():
            numbers = {shown(m): [part[m], *interval] for m, interval in part["interval"].items()}
            numbers_of = {"prompts": part["prompts"], "samples": part["samples"], "numbers": numbers}
            tables.setdefault(shown(source), {})[when] = numbers_of
    return tables


def _parts(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {data source: its numbers}, "" for all prompts."""
    return {"": report, **report.get("by_data_source", {})}


def _is_whole(report: dict[str, Any] | None) -> bool:
    """Return whether every number of an evaluation has its interval."""
    try:
        return report is not None and all(
            all(map(_is_number, (part[m], *part["interval"][m], part["prompts"], part["samples"])))
            and len(part["interval"][m]) == 2
            for part in _parts(report).values()
            for m in part["interval"]
        )
    except (AttributeError, KeyError, TypeError):
        return False


def compact(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Return (prompts, samples) as `RunPage` holds them: each prompt once, each group's responses once, best first."""
    places: dict[str, int] = {}
    samples = []
    for row in rows:
        times: dict[tuple[str, float], int] = {}
        for text, reward in zip(row["responses"], row["rewards"], strict=True):
            key = (shown(text), float(f"{reward:.5g}"))
            times[key] = times.get(key, 0) + 1
        ranked = sorted(times, key=lambda key: -key[1])  # NaN cannot be here: a score is a number
        texts = [text for text, _ in ranked]
        pair = [shown(row[side]) if isinstance(row.get(side), str) else None for side in ("chosen", "rejected")]
        truth = row.get("ground_truth")
        samples.append(
            [
                row["step"],
                places.setdefault(shown(row["prompt"]), len(places)),
                shown(truth if isinstance(truth, str) else json.dumps(truth, ensure_ascii=False)),
                [[text, reward, times[text, reward]] for text, reward in ranked],
                *(texts.index(text) if text in texts else None for text in pair),
            ]
        )
    return [*places], samples


def fit(runs: list[RunPage], most: int = MOST_CHARACTERS) -> int:
    """Drop the samples of evenly spaced steps until those of all runs fit into a page. Return of how many steps one is
    kept: 1 where nothing is dropped."""
    size = sum(len(text) for run in runs for row in run.samples for text, _, _ in row[3])
    every = math.ceil(size / most)
    if every <= 1:
        return 1
    for run in runs:
        steps = sorted({row[0] for row in run.samples})
        kept = {steps[0], *steps[every - 1 :: every]}
        run.samples = [row for row in run.samples if row[0] in kept]
        run.notes.append(f"samples of one step in {every} only: all of them would be too large for a page")
    return every

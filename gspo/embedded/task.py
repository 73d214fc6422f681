"""Hold what the embedded tasks share: problems dealt out to splits, rows, and the files they are written to."""

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from gspo.system.files import write_text

LANGUAGES = ("en", "zh")
SPLIT_SIZES = {"train": 1024, "dev": 256, "test": 512}


@dataclass(frozen=True)
class Task:
    """A kind of problem, how a pupil is asked and what it writes. A problem has a `shape` and a `text`, its name."""

    name: str
    model_dir: Path  # where the warm-started model ships
    data_dir: Path
    split_problems: Callable[[], dict[str, list[Any]]]  # train, dev, test, and warm: those of the warm start
    prompt_text: Callable[[Any, str, random.Random], str]  # (problem, language, rng)
    worked_solution: Callable[[Any, str, random.Random, bool], str]  # (problem, language, rng, with mistakes)
    ground_truth: Callable[[Any, str], str]  # (problem, language)
    single: str = r"\d"  # the characters that are always a token of their own


def deal(problems: Iterable[Any], sizes: dict[str, int], train_sixteenths: int = 6) -> dict[str, list[Any]]:
    """Return {test, dev, train, warm}: disjoint lists, in the order of a hash of the problems' texts.

    Each shape deals its problems out in sixteenths (2 test, 1 dev, some train, the rest warm start), so that a rare
    shape is in every split; then each split draws round robin, so that all shapes are about equally common.
    """
    unique = {p.text: p for p in problems}
    ordered = sorted(unique.values(), key=lambda p: hashlib.sha256(p.text.encode()).digest())
    by_shape: dict[str, list[Any]] = {}
    for p in ordered:
        by_shape.setdefault(p.shape, []).append(p)
    share = {"test": range(0, 2), "dev": range(2, 3), "train": range(3, 3 + train_sixteenths)}
    splits: dict[str, list[Any]] = {}
    for name, sixteenths in share.items():
        queues = [[p for i, p in enumerate(members) if i % 16 in sixteenths] for members in by_shape.values()]
        splits[name] = [p for turn in zip_longest(*queues) for p in turn if p is not None][: sizes[name]]
    held_out = {p.text for name in splits for p in splits[name]}
    splits["warm"] = [p for p in ordered if p.text not in held_out]
    return splits


def make_rows(task: Task, splits: dict[str, list[Any]], names: Iterable[str]) -> dict[str, list[dict[str, str]]]:
    """Return {split: its rows}, the same every time."""
    rows: dict[str, list[dict[str, str]]] = {}
    for name in names:
        rng = random.Random(f"{task.name}/{name}")
        rows[name] = []
        for problem in splits[name]:
            language = rng.choice(LANGUAGES)
            row = {
                "prompt": task.prompt_text(problem, language, rng),
                "ground_truth": task.ground_truth(problem, language),
                "data_source": f"{task.name}_{language}",
                "solution": task.worked_solution(problem, language, rng, False),
            }
            rows[name].append(row)
    return rows


def write_rows(rows: dict[str, list[dict[str, str]]], folder: Path) -> None:
    """Write one JSON file a split, the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in rows.items():
        text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in part) + "\n]\n"
        write_text(folder / f"{name}.json", text)


def program(write_splits: Callable[[Path], None], default: Path, sizes: dict[str, int]) -> None:
    """Write the splits to the folder that the command line names, or else to `default`."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    write_splits(target)
    print(f"wrote {', '.join(f'{n}.json ({s} rows)' for n, s in sizes.items())} to {target}")

"""Read prompts from files and encode each when it is needed.

Before training, every row is read and checked once (`survey`) and then dropped: memory only holds where rows begin.
"""

import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from gspo.config import Config
from gspo.data.encoding import Encoder, check_template_kwargs
from gspo.data.messages import question_of, read_tools
from gspo.data.row_checker import NO_LIMIT, RowChecker, TooLong, say_fields
from gspo.data.schemas import parse_row
from gspo.data.shapes import RenamedRows
from gspo.data.sources import Source, open_source
from gspo.data.stored_rows import split_row
from gspo.embedded import DATA_DIR, equations
from gspo.errors import UserError
from gspo.system.console import say, track
from gspo.system.language import word
from gspo.types import Prompt

EMBEDDED = "embedded"  # in place of a file's name: the embedded equations
EMBEDDED_FILE = {"train": "train.json", "val": "dev.json", "test": "test.json"}
HUB_SPLIT = {"train": "train", "val": "validation", "test": "test"}  # split of a data set whose name gives none


class Prompts(Sequence[Prompt]):
    """The prompts of some sources, read and encoded on access. `kept`: the row numbers, counted over all sources;
    `stored`: rows may hold responses."""

    def __init__(
        self,
        sources: list[Source],
        encoder: Encoder,
        max_length: int,
        kept: Sequence[int] | None = None,
        stored: bool = False,
    ):
        self._sources, self._encoder, self._max_length, self._stored = sources, encoder, max_length, stored
        self._firsts = [sum(len(s) for s in sources[:k]) for k in range(len(sources))]
        self._kept = range(sum(map(len, sources))) if kept is None else kept

    def __len__(self) -> int:
        return len(self._kept)

    def _find(self, i: int) -> tuple[int, Source, int]:
        """Return of prompt `i`: its row number over all sources, its source, its row in there."""
        number = int(self._kept[i])
        k = bisect_right(self._firsts, number) - 1
        return number, self._sources[k], number - self._firsts[k]

    def files(self) -> str:
        """Return the names of the sources with their numbers of rows: `a.jsonl (1,200 rows), b.jsonl (7 rows)`."""
        return ", ".join(f"{s.name} ({len(s):,} {word('row' if len(s) == 1 else 'rows')})" for s in self._sources)

    def place(self, i: int) -> str:
        """Return where prompt `i` is, for messages: file and row or line."""
        _, source, row = self._find(i)
        return source.place(row)

    @overload
    def __getitem__(self, i: int) -> Prompt: ...
    @overload
    def __getitem__(self, i: slice) -> "Prompts": ...
    def __getitem__(self, i: int | slice) -> "Prompt | Prompts":
        if isinstance(i, slice):
            return Prompts(self._sources, self._encoder, self._max_length, self._kept[i], self._stored)
        number, source, row = self._find(i)
        place = source.place(row)
        fields, stored = split_row(source[row], place, required=False) if self._stored else (source[row], None)
        messages, truth, data_source, extra = parse_row(fields, place, needs_truth=False, stored=stored is not None)
        ids = self._encoder.ids(messages, place, read_tools(fields.get("tools"), place))
        if len(ids) > self._max_length:  # longer than the survey's bound, or the file has changed since
            raise TooLong(place, len(ids), self._max_length)
        return Prompt(number, ids, question_of(messages), truth, data_source, extra, stored)


def scorable(prompts: Sequence[Prompt]) -> bool:
    """Return whether there are prompts, and responses to them can be scored: not where rows hold responses alone.

    Without a ground truth they are scored by a function of the user's, which the survey made sure of.
    """
    # All rows of a split are alike: RowChecker.
    return bool(prompts) and (prompts[0].ground_truth is not None or prompts[0].stored is None)


def group_size(cfg: Config, train: Sequence[Prompt]) -> int:
    """Return the number of responses that are learned from per prompt: those that rows hold, else rollout.n."""
    return cfg.rollout.n if train[0].stored is None else len(train[0].stored.texts)


@dataclass(frozen=True)
class Survey:
    """The good rows that one pass over the files has found."""

    prompts: Prompts
    keys: np.ndarray  # [len(prompts)] int64, `prompt_key` of each
    truths: np.ndarray  # [len(prompts)] int64, a hash of each ground truth; 0 where there is none

    def contradictions(self) -> list[tuple[int, int]]:
        """Return pairs of prompts, in their order, that are one prompt with two ground truths: one pair a prompt."""
        rows = np.flatnonzero(self.truths)
        rows = rows[np.argsort(self.keys[rows], kind="stable")]
        keys, truths = self.keys[rows], self.truths[rows]
        found = np.flatnonzero((keys[1:] == keys[:-1]) & (truths[1:] != truths[:-1]))
        found = found[np.unique(keys[found], return_index=True)[1]]
        return sorted(zip(rows[found].tolist(), rows[found + 1].tolist(), strict=True), key=lambda pair: pair[1])

    def contradiction(self, pair: tuple[int, int]) -> str:
        """Return where the two are, and what they say."""
        return " and ".join(f"{self.prompts.place(i)} has {self.prompts[i].ground_truth!r:.60}" for i in pair)


def survey(
    files: list[str],
    checker: RowChecker,
    on_bad_row: Callable[[UserError], None],
    *,
    split: str = "train",
    limit: int | None = None,
    keys_named: tuple[str | None, str | None] = (None, None),
) -> Survey:
    """Check every row, up to `limit` good ones. `on_bad_row` is given each bad row's error and may raise it."""
    sources: list[Source] = []
    keys, bad, number = array("q"), array("q"), 0
    for name in files:
        if limit is not None and len(keys) >= limit:
            break
        source = open_source(name, split)
        source = RenamedRows(source, *keys_named) if any(keys_named) else source
        sources.append(source)
        for i, row in enumerate(track(source.rows(), f"reading {name}", len(source))):
            try:
                keys.append(checker(row, source.place(i)))
            except UserError as e:
                on_bad_row(e)
                bad.append(number)
            number += 1
            if len(keys) == limit:
                break
    kept = np.delete(np.arange(number), np.frombuffer(bad, np.int64)) if bad else range(number)
    found = np.frombuffer(keys, np.int64) if keys else np.zeros(0, np.int64)
    prompts = Prompts(sources, checker.encoder, checker.max_length, kept, checker.stored)
    return Survey(prompts, found, np.frombuffer(checker.truths, np.int64) if keys else np.zeros(0, np.int64))


def load_survey(
    files: list[str],
    checker: RowChecker,
    overlong: str = "error",
    split: str = "train",
    limit: int | None = None,
    keys_named: tuple[str | None, str | None] = (None, None),
) -> Survey:
    """Check every row for training. Raise the first mistake; overlong="drop" leaves out prompts that are too long."""
    dropped = 0

    def on_bad_row(error: UserError) -> None:
        nonlocal dropped
        if overlong != "drop" or not isinstance(error, TooLong):
            raise error
        dropped += 1

    found = survey(files, checker, on_bad_row, split=split, limit=limit, keys_named=keys_named)
    if dropped:
        say(f"dropped {dropped} prompts longer than {checker.max_length} tokens")
    if not len(found.prompts):
        raise UserError(
            f"no prompts in {', '.join(files)}" + (f" ({dropped} dropped as too long)." if dropped else ".")
        )
    return found


@dataclass(frozen=True)
class Splits:
    """Prompts to train on, and held-out ones: `val` for the win rate of rounds, `test` for the table; may be empty."""

    train: Sequence[Prompt]
    val: Sequence[Prompt]
    test: Sequence[Prompt]
    fingerprints: dict[str, str] = field(default_factory=dict)  # data.train_files and so on -> of their rows


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split, as configured."""

    name: str
    files: list[str]
    split: str  # split of a data set whose name gives none
    limit: int | None  # most prompts


def configured_splits(cfg: Config, only_test: bool = False) -> Iterator[SplitFiles]:
    """Yield the splits that have files; `embedded` is the embedded equations, written if they are missing.

    Without training files the embedded model trains on these, and any other is refused: UserError.
    """
    files = {"train": cfg.data.train_files, "val": cfg.data.val_files, "test": cfg.data.test_files}
    if not files["train"]:
        if cfg.model.path is not None and not only_test:
            raise UserError(
                f"model.path = {cfg.model.path!r}, but data.train_files names no data to train it on. Give "
                "data.train_files=[FILE]; data.train_files=embedded trains on the embedded equations."
            )
        files = {name: given or [EMBEDDED] for name, given in files.items()}
    files = {
        name: [str(DATA_DIR / EMBEDDED_FILE[name]) if f == EMBEDDED else f for f in given]
        for name, given in files.items()
    }
    if any(not Path(f).exists() and Path(f).parent == DATA_DIR for given in files.values() for f in given):
        equations.write_splits()
    hub_split = {**HUB_SPLIT, "test": HUB_SPLIT["test" if files["test"] else "val"]}
    files["test"] = files["test"] or files["val"]
    if only_test and not files["test"]:
        raise UserError(
            "nothing to evaluate on: data.test_files and data.val_files are empty; give eval.py --data FILE."
        )
    limits = {"val": cfg.eval.round_prompts, "test": cfg.eval.prompts, "train": None}
    for name, given in files.items():
        if given and limits[name] != 0 and (name == "test" or not only_test):
            yield SplitFiles(name, given, hub_split[name], limits[name])


def make_checker(
    cfg: Config,
    tokenizer: Any,
    model_config: Any,
    split: str,
    needs_solutions: bool = False,
    stored: bool = False,
) -> RowChecker:
    """Return the checker for a split, by this configuration and model. What the objective needs, training rows have."""
    text = model_config.get_text_config()
    room = getattr(text, "max_position_embeddings", None)
    return RowChecker(
        Encoder(tokenizer, cfg.data.system_prompt, cfg.data.chat_template_kwargs, text.vocab_size),
        cfg.data.max_prompt_length,
        NO_LIMIT if room is None else room - cfg.rollout.max_new_tokens,
        only_texts=cfg.reward.path is None,
        needs_solutions=needs_solutions and split == "train",
        stored=stored,
        needs_responses=stored and split == "train",
        max_response=cfg.rollout.max_new_tokens,
    )


def check_positions(checker: RowChecker, cfg: Config) -> None:
    """Raise UserError where the longest prompt and its response have more tokens than the model has positions."""
    if checker.longest > checker.positions:
        raise UserError(
            f"a prompt of {checker.longest} tokens and rollout.max_new_tokens = {cfg.rollout.max_new_tokens} need more "
            f"than the {checker.positions + cfg.rollout.max_new_tokens} positions of this model: lower "
            "rollout.max_new_tokens or data.max_prompt_length."
        )


def say_repeats(configured: SplitFiles) -> None:
    """Say which file a split names twice, under whatever names: its rows count twice."""
    seen: dict[str, str] = {}
    for name in configured.files:
        real = os.path.realpath(name)
        if real in seen:
            both = name if name == seen[real] else f"{seen[real]} and {name}"
            say(f"note: data.{configured.name}_files names one file twice ({both}), so its rows count twice.")
        seen.setdefault(real, name)


def say_contradictions(configured: SplitFiles, found: Survey) -> None:
    """Say how many prompts of a split are there with several ground truths, and where the first is."""
    if pairs := found.contradictions():
        say(
            f"warning: data.{configured.name}_files: {len(pairs)} prompts have different ground truths in several rows "
            f"(first: {found.contradiction(pairs[0])}), so what is right in one row is wrong in another. python -m "
            "gspo.check_data names more."
        )


def load_splits(
    cfg: Config,
    tokenizer: Any,
    model_config: Any,
    *,
    only_test: bool = False,
    needs_solutions: bool = False,
    stored: bool = False,
) -> Splits:
    """Read the prompts of the configured files; without training files, of the embedded equations.

    `needs_solutions`: refuse training rows without a `solution`. `stored`: ... without responses; held-out rows may
    hold some.
    """
    found: dict[str, Survey] = {}
    prints: dict[str, str] = {}
    checkers: list[RowChecker] = []
    check_template_kwargs(tokenizer, cfg.data.chat_template_kwargs)
    for configured in configured_splits(cfg, only_test):
        checker = make_checker(cfg, tokenizer, model_config, configured.name, needs_solutions, stored)
        found[configured.name] = load_survey(
            configured.files,
            checker,
            cfg.data.overlong,
            configured.split,
            configured.limit,
            (cfg.data.prompt_key, cfg.data.truth_key),
        )
        checkers.append(checker)
        say_repeats(configured)
        say_contradictions(configured, found[configured.name])
        check_positions(checker, cfg)
        if checker.equal_pairs:
            say(
                f"note: data.{configured.name}_files: nothing is learned from {checker.equal_pairs} rows, as all their "
                "responses are the same text"
            )
        prints[f"data.{configured.name}_files"] = checker.fingerprint()
    say_fields(checkers, own_function=cfg.reward.path is not None)
    held_out = [found[name].keys for name in ("val", "test") if name in found]
    if "train" in found and held_out and (count := int(in_common(found["train"].keys, np.concatenate(held_out)).sum())):
        say(
            f"warning: {count} of {len(found['train'].prompts)} training prompts are also among the held-out ones "
            "(data.val_files, data.test_files): results on those say little. python -m gspo.check_data names them."
        )
    return Splits(*(found[name].prompts if name in found else [] for name in ("train", "val", "test")), prints)


def in_common(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return which of the keys are among the others, [len(keys)] bool."""
    if not len(others):
        return np.zeros(len(keys), bool)
    others = np.sort(others)
    return others[np.searchsorted(others, keys).clip(max=len(others) - 1)] == keys

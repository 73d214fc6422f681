"""Prompts in token ids, made from rows when they are asked for.

Before training every row is read, checked and forgotten (`survey`); what stays in memory is where rows begin.
"""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from gspo.config import Config
from gspo.data.encoding import Encoder, encode
from gspo.data.schemas import Messages, parse_row
from gspo.data.sources import Source, open_source
from gspo.embedded import DATA_DIR, equations
from gspo.errors import UserError
from gspo.system.console import say, track
from gspo.types import Prompt

__all__ = ["Checker", "Prompts", "Splits", "Survey", "TooLong", "encode", "load_prompts", "load_splits"]

EMBEDDED = {"train": "train.json", "val": "dev.json", "test": "test.json"}
HUB_SPLIT = {"train": "train", "val": "validation", "test": "test"}  # of a data set that names none
NO_LIMIT = 1 << 62
SPACES = bytes.maketrans(b"\t\n\v\f\r", b" " * 5)


class TooLong(UserError):
    """A prompt with more tokens than data.max_prompt_length."""

    def __init__(self, place: str, length: int, most: int):
        super().__init__(
            f"{place}: the prompt has {length} tokens, data.max_prompt_length is {most}. "
            "Raise it, or set data.overlong=drop."
        )


class Prompts(Sequence[Prompt]):
    """The prompts of some sources, read and encoded on access. `kept`: which rows, counted over all sources."""

    def __init__(self, sources: list[Source], encoder: Encoder, max_length: int, kept: Sequence[int] | None = None):
        self._sources, self._encoder, self._max_length = sources, encoder, max_length
        self._firsts = [sum(len(s) for s in sources[:k]) for k in range(len(sources))]
        self._kept = range(sum(map(len, sources))) if kept is None else kept

    def __len__(self) -> int:
        return len(self._kept)

    def _find(self, i: int) -> tuple[int, Source, int]:
        number = int(self._kept[i])
        k = bisect_right(self._firsts, number) - 1
        return number, self._sources[k], number - self._firsts[k]

    def place(self, i: int) -> str:
        """Where prompt `i` stands, for messages."""
        _, source, row = self._find(i)
        return source.place(row)

    @overload
    def __getitem__(self, i: int) -> Prompt: ...
    @overload
    def __getitem__(self, i: slice) -> "Prompts": ...
    def __getitem__(self, i: int | slice) -> "Prompt | Prompts":
        if isinstance(i, slice):
            return Prompts(self._sources, self._encoder, self._max_length, self._kept[i])
        number, source, row = self._find(i)
        place = source.place(row)
        messages, truth, data_source, extra = parse_row(source[row], place)
        ids = self._encoder.ids(messages, place)
        if len(ids) > self._max_length:  # the survey's bound let it pass, or the file has changed
            raise TooLong(place, len(ids), self._max_length)
        return Prompt(number, ids, messages[-1]["content"], truth, data_source, extra)


class Checker:
    """What a row must pass before training; tokenizes only where the bound leaves a doubt.

    `positions`: tokens that the model has room for, which the longest prompt must not exceed.
    """

    def __init__(self, encoder: Encoder, max_length: int, positions: int = NO_LIMIT):
        self.encoder, self.max_length, self.positions = encoder, max_length, positions
        self.longest = 0  # of those tokenized, which include all that are longer than `positions`
        self._settled = min(max_length, positions)  # a bound up to here needs no look

    def __call__(self, row: Any, place: str) -> int:
        """The key of a good row's prompt. Raises UserError, TooLong if its length is what is wrong."""
        if isinstance(row, UserError):
            raise row
        messages = parse_row(row, place)[0]
        bound = self.encoder.bound(messages, place)
        if bound is None or bound > self._settled:
            length = len(self.encoder.ids(messages, place))
            if length > self.max_length:
                raise TooLong(place, length, self.max_length)
            if length > self.longest:
                self.longest = length
                self._settled = min(self.max_length, max(self.positions, length))
        return key(messages)


def key(messages: Messages) -> int:
    """64 bits of the messages' text, ASCII whitespace levelled: what makes two prompts the same in this process."""
    text = messages[0]["content"] if len(messages) == 1 else "\n".join([m["content"] for m in messages])
    data = text.encode("utf-8", "surrogatepass").translate(SPACES).strip()
    while b"  " in data:
        data = data.replace(b"  ", b" ")
    return hash(data)


@dataclass(frozen=True)
class Survey:
    """What one pass over the rows has found: the good ones, and their keys in the same order."""

    prompts: Prompts
    keys: np.ndarray


def survey(
    files: list[str],
    checker: Checker,
    left_out: Callable[[UserError], None],
    *,
    split: str = "train",
    limit: int | None = None,
) -> Survey:
    """Check every row, up to `limit` good ones. `left_out` is told of each bad row and raises, or it is passed over."""
    sources: list[Source] = []
    keys, bad, number = array("q"), array("q"), 0
    for name in files:
        if limit is not None and len(keys) >= limit:
            break
        source = open_source(name, split)
        sources.append(source)
        for i, row in enumerate(track(source.rows(), f"reading {name}", len(source))):
            try:
                keys.append(checker(row, source.place(i)))
            except UserError as e:
                left_out(e)
                bad.append(number)
            number += 1
            if len(keys) == limit:
                break
    kept = np.delete(np.arange(number), np.frombuffer(bad, np.int64)) if bad else range(number)
    found = np.frombuffer(keys, np.int64) if keys else np.zeros(0, np.int64)
    return Survey(Prompts(sources, checker.encoder, checker.max_length, kept), found)


def load_survey(
    files: list[str],
    checker: Checker,
    overlong: str = "error",
    split: str = "train",
    limit: int | None = None,
) -> Survey:
    """The survey that training wants: the first mistake is raised, prompts too long are dropped where that is asked."""
    dropped = 0

    def left_out(error: UserError) -> None:
        nonlocal dropped
        if overlong != "drop" or not isinstance(error, TooLong):
            raise error
        dropped += 1

    found = survey(files, checker, left_out, split=split, limit=limit)
    if dropped:
        say(f"dropped {dropped} prompts longer than {checker.max_length} tokens")
    if not len(found.prompts):
        raise UserError(
            f"no prompts in {', '.join(files)}" + (f" ({dropped} dropped as too long)." if dropped else ".")
        )
    return found


def load_prompts(
    files: list[str],
    tokenizer: Any,
    *,
    max_prompt_length: int,
    overlong: str = "error",
    system_prompt: str | None = None,
    chat_template_kwargs: dict | None = None,
    limit: int | None = None,
    vocab_size: int | None = None,
    split: str = "train",
) -> Prompts:
    """Read and check every row; UserError names the file, row and field that is wrong."""
    encoder = Encoder(tokenizer, system_prompt, chat_template_kwargs, vocab_size)
    return load_survey(files, Checker(encoder, max_prompt_length), overlong, split, limit).prompts


@dataclass(frozen=True)
class Splits:
    """Prompts to train on, and held-out ones: `val` for the rounds, `test` for the table. These two may be empty."""

    train: Sequence[Prompt]
    val: Sequence[Prompt]
    test: Sequence[Prompt]


@dataclass(frozen=True)
class Wanted:
    """One split as the configuration wants it."""

    name: str
    files: list[str]
    split: str  # of a data set that names none
    limit: int | None


def wanted_splits(cfg: Config, only_test: bool = False) -> Iterator[Wanted]:
    """The splits that are not empty; the embedded equations, written if need be, where no training files are named."""
    files = {"train": cfg.data.train_files, "val": cfg.data.val_files, "test": cfg.data.test_files}
    if not files["train"]:
        files = {name: given or [str(DATA_DIR / EMBEDDED[name])] for name, given in files.items()}
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
            yield Wanted(name, given, hub_split[name], limits[name])


def make_checker(cfg: Config, tokenizer: Any, model_config: Any) -> Checker:
    """The checker that the configuration asks for."""
    text = model_config.get_text_config()
    room = getattr(text, "max_position_embeddings", None)
    return Checker(
        Encoder(tokenizer, cfg.data.system_prompt, cfg.data.chat_template_kwargs, text.vocab_size),
        cfg.data.max_prompt_length,
        NO_LIMIT if room is None else room - cfg.rollout.max_new_tokens,
    )


def check_positions(checker: Checker, cfg: Config) -> None:
    """UserError when the longest prompt and its answer have more tokens than the model has positions."""
    if checker.longest > checker.positions:
        raise UserError(
            f"a prompt of {checker.longest} tokens and rollout.max_new_tokens = {cfg.rollout.max_new_tokens} need more "
            f"than the {checker.positions + cfg.rollout.max_new_tokens} positions of this model: lower "
            "rollout.max_new_tokens or data.max_prompt_length."
        )


def load_splits(cfg: Config, tokenizer: Any, model_config: Any, *, only_test: bool = False) -> Splits:
    """The prompts that the configuration names; the embedded equations where it names none."""
    found: dict[str, Survey] = {}
    for wanted in wanted_splits(cfg, only_test):
        checker = make_checker(cfg, tokenizer, model_config)
        found[wanted.name] = load_survey(wanted.files, checker, cfg.data.overlong, wanted.split, wanted.limit)
        check_positions(checker, cfg)
    held_out = [found[name].keys for name in ("val", "test") if name in found]
    if "train" in found and held_out and (count := int(shared(found["train"].keys, np.concatenate(held_out)).sum())):
        say(
            f"warning: {count} of {len(found['train'].prompts)} training prompts are also among the held-out ones "
            "(data.val_files, data.test_files): results on those say little. python -m gspo.check_data names them."
        )
    return Splits(*(found[name].prompts if name in found else [] for name in ("train", "val", "test")))


def shared(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[len(keys)] bool: which of the keys are among the others."""
    if not len(others):
        return np.zeros(len(keys), bool)
    others = np.sort(others)
    return others[np.searchsorted(others, keys).clip(max=len(others) - 1)] == keys

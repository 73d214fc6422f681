"""Rows on disk -> prompts in token ids, and the order in which they are trained.

Two row schemas are read, from JSON (a list), JSONL or parquet (with pyarrow):
the seed's `{"prompt": str, "ground_truth": str, "data_source": str}` and verl's
`{"data_source", "prompt": [{"role", "content"}], "reward_model": {"ground_truth"}, "extra_info": {...}}`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gspo.config import Config
from gspo.embedded import DATA_DIR, equations
from gspo.errors import UserError
from gspo.progress import track
from gspo.types import Prompt

Row = dict[str, Any]
EMBEDDED = {"train": "train.json", "val": "dev.json", "test": "test.json"}


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of one file; place names file and row for error messages."""
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        try:
                            yield f"{path}, line {number}", json.loads(line)
                        except json.JSONDecodeError as e:
                            raise UserError(f"{path}, line {number} is not valid JSON: {e}.") from e
        else:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(rows, list):
                raise UserError(f"{path} holds a JSON {type(rows).__name__}; a list of rows is needed: [{{...}}, ...].")
            for number, row in enumerate(rows, 1):
                yield f"{path}, row {number}", row
    except OSError as e:
        raise UserError(f"data file {path}: {e.strerror or e}.") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}).") from e
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not valid JSON: {e}. One object a line? Then name it .jsonl.") from e


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow.") from e
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as e:
        raise UserError(f"{path} is not a parquet file: {e}.") from e
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path}, row {number}", row


def parse_row(row: Any, place: str) -> tuple[list[dict[str, str]], str, str, dict]:
    """A row of either schema -> (messages, ground_truth, data_source, extra_info)."""

    def need(holds: bool, name: str, what: str) -> None:
        if not holds:
            got = f"{row[name]!r:.80}" if isinstance(row, dict) and name in row else "nothing"
            raise UserError(f"{place}: field {name!r} must be {what}, got {got}.")

    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be an object with prompt, ground_truth and data_source, got {row!r:.80}.")
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        need(bool(prompt.strip()), "prompt", "a text that is not empty")
        messages = [{"role": "user", "content": prompt}]
    else:
        ok = isinstance(prompt, list) and prompt
        ok = ok and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in prompt)
        ok = ok and all(isinstance(m.get("content"), str) for m in prompt)
        need(ok, "prompt", "a text, or a list of {role, content} messages")
        messages = [{"role": m["role"], "content": m["content"]} for m in prompt]
    if "reward_model" in row:
        truth = row["reward_model"].get("ground_truth") if isinstance(row["reward_model"], dict) else None
        need(
            isinstance(truth, str | int | float),
            "reward_model",
            'an object like {"style": "rule", "ground_truth": ...}',
        )
    else:
        truth = row.get("ground_truth")
        need(isinstance(truth, str | int | float), "ground_truth", "a text or a number")
    source = row.get("data_source", "unknown")
    need(isinstance(source, str), "data_source", "a text")
    extra = row.get("extra_info") or {}
    need(isinstance(extra, dict), "extra_info", "an object")
    if "solution" in row:
        extra = {**extra, "solution": row["solution"]}
    return messages, str(truth), source, extra


def encode(
    messages: list[dict[str, str]], tokenizer: Any, system: str | None, template_kwargs: dict
) -> tuple[int, ...]:
    """Messages -> token ids up to where the answer begins; without a chat template, the plain text."""
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template_kwargs)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return tuple(tokenizer("\n".join(m["content"] for m in messages))["input_ids"])


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
) -> list[Prompt]:
    """Read, check and tokenize every row; UserError names the file, row and field that is wrong."""
    prompts, dropped = [], 0
    rows = (pair for name in files for pair in read_rows(Path(name)))
    for number, (place, row) in enumerate(track(rows, f"reading {', '.join(files)}")):
        if limit is not None and len(prompts) == limit:
            break
        messages, truth, source, extra = parse_row(row, place)
        try:
            ids = encode(messages, tokenizer, system_prompt, chat_template_kwargs or {})
        except Exception as e:  # templates refuse roles, tokenizers refuse half characters; both raise many kinds
            raise UserError(f"{place}: the tokenizer refuses this prompt: {' '.join(str(e).split()):.200}.") from e
        if not ids or (vocab_size is not None and max(ids) >= vocab_size):
            raise UserError(
                f"{place}: the tokenizer gives no ids, or ids outside the model's {vocab_size}; wrong tokenizer?"
            )
        if len(ids) > max_prompt_length:
            if overlong == "error":
                raise UserError(
                    f"{place}: the prompt has {len(ids)} tokens, data.max_prompt_length is {max_prompt_length}. "
                    "Raise it, or set data.overlong=drop."
                )
            dropped += 1
            continue
        prompts.append(Prompt(number, ids, messages[-1]["content"], truth, source, extra))
    if dropped:
        print(f"dropped {dropped} prompts longer than {max_prompt_length} tokens")
    if not prompts:
        raise UserError(
            f"no prompts in {', '.join(files)}" + (f" ({dropped} dropped as too long)." if dropped else ".")
        )
    return prompts


@dataclass(frozen=True)
class Splits:
    """Prompts to train on, and held-out ones: `val` for the rounds, `test` for the table. These two may be empty."""

    train: list[Prompt]
    val: list[Prompt]
    test: list[Prompt]


def load_splits(cfg: Config, tokenizer: Any, model_config: Any, *, only_test: bool = False) -> Splits:
    """The prompts that the configuration names; the embedded equations where it names none."""
    files = {"train": cfg.data.train_files, "val": cfg.data.val_files, "test": cfg.data.test_files}
    if not files["train"]:
        files = {name: given or [str(DATA_DIR / EMBEDDED[name])] for name, given in files.items()}
    if any(not Path(f).exists() and Path(f).parent == DATA_DIR for given in files.values() for f in given):
        equations.write_splits()
    files["test"] = files["test"] or files["val"]
    if only_test and not files["test"]:
        raise UserError(
            "nothing to evaluate on: data.test_files and data.val_files are empty; give eval.py --data FILE."
        )
    limits = {"val": cfg.eval.round_prompts, "test": cfg.eval.prompts, "train": None}
    loaded = {}
    for name, given in files.items():
        wanted = given and limits[name] != 0 and (name == "test" or not only_test)
        loaded[name] = _load(given, tokenizer, model_config, cfg, limits[name]) if wanted else []
    return Splits(**loaded)


def _load(files: list[str], tokenizer: Any, model_config: Any, cfg: Config, limit: int | None) -> list[Prompt]:
    text_config = model_config.get_text_config()
    prompts = load_prompts(
        files,
        tokenizer,
        max_prompt_length=cfg.data.max_prompt_length,
        overlong=cfg.data.overlong,
        system_prompt=cfg.data.system_prompt,
        chat_template_kwargs=cfg.data.chat_template_kwargs,
        limit=limit,
        vocab_size=text_config.vocab_size,
    )
    longest, room = max(len(p.ids) for p in prompts), getattr(text_config, "max_position_embeddings", None)
    if room is not None and longest + cfg.rollout.max_new_tokens > room:
        raise UserError(
            f"a prompt of {longest} tokens and rollout.max_new_tokens = {cfg.rollout.max_new_tokens} need more than "
            f"the {room} positions of this model: lower rollout.max_new_tokens or data.max_prompt_length."
        )
    return prompts


@dataclass(frozen=True)
class Batches:
    """The training order: batch `step` is a function of the seed alone, so a resumed run needs only the step number."""

    prompts: list[Prompt]
    size: int
    seed: int
    shuffle: bool = True

    @property
    def per_epoch(self) -> int:
        return -(-len(self.prompts) // self.size)

    def __getitem__(self, step: int) -> list[Prompt]:
        epoch, index = divmod(step, self.per_epoch)
        order = np.arange(len(self.prompts))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        return [self.prompts[i] for i in order[index * self.size : (index + 1) * self.size]]

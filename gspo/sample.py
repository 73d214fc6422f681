"""Sample N responses to each of a list of prompts from any Hugging Face causal language model.

    python -m gspo.sample MODEL PROMPTS ANSWERS.jsonl [--n 8 --temperature 0.9 --max_new_tokens 512 --stop TEXT ...]

PROMPTS is a JSON, JSONL or parquet file of rows, or a data set, with a `prompt`: a text, or a list of {role, content}
messages; `embedded`, `embedded@val` and `embedded@test` are the embedded equations. Every row is written with its
`answers`, in the same order. The file is called ANSWERS.jsonl.part until the last row is written. In Python: `sample`.

--score writes rows to learn from instead: `responses`, their `rewards` by the reward function, and `finish_reasons`
(rollout.source=rows). --pairs writes `chosen` and `rejected`, the best and the worst response of each prompt whose
rewards differ by more than --margin (objective.algorithm=dpo).

Settings may be given as well: data.system_prompt="Be brief." data.chat_template=FILE reward.reward_kwargs.k=3
data.chat_template_kwargs.enable_thinking=false (python -m gspo.parameters). A checkpoint of a run is given its run's
system prompt, chat template and template arguments unless they are set here.
"""

import argparse
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from torch import nn

from gspo.algorithm.pairs import TOLERANCE
from gspo.checkpoint.adapter_checkpoints import base_of, load_policy
from gspo.checkpoint.find_runs import checkpoint_of, config_of
from gspo.config import Config
from gspo.data.encoding import Encoder, check_template_kwargs
from gspo.data.messages import Messages, question_of, read_messages, read_tools
from gspo.data.prompts import EMBEDDED, EMBEDDED_FILE
from gspo.data.row_checker import NO_LIMIT, RowChecker, say_fields
from gspo.data.schemas import parse_row, published_row, require_prompt
from gspo.data.shapes import RenamedRows, prompt_of, with_our_fields
from gspo.data.sources import Source, open_source
from gspo.embedded import DATA_DIR, equations
from gspo.errors import UserError
from gspo.models.loading import load_model_config, load_tokenizer
from gspo.models.model_folder import called
from gspo.models.precision import DTYPES, choose_precision
from gspo.program_settings import SAMPLING, parse_with_settings
from gspo.read_config import keys_of, load_config
from gspo.read_paths import check_path
from gspo.reward.scorer import Scorer
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import EVAL, Sampler
from gspo.system.console import say
from gspo.system.devices import choose_device
from gspo.system.files import replacing
from gspo.system.help_text import HelpText
from gspo.system.program import guarded
from gspo.types import Prompt, Rollout

Rows = Iterator[dict[str, Any]]
ROWS_AT_ONCE = 1024  # rows that are sampled, and then written, together
SETTINGS = re.compile(  # what the command reads
    rf"data\.(system_prompt|chat_template|chat_template_kwargs|prompt_key|truth_key)|reward\..*|{SAMPLING}|eval\.n|model\.precision|trainer\.seed"
    r"|objective\.margin"
)
FLAGS = {  # flag -> the parameter that it stands for
    "n": "eval.n",
    **{name: f"rollout.{name}" for name in ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "stop")},
    **{name: f"rollout.{name}" for name in ("skip_special_tokens", "kv_memory_gib")},
    "precision": "model.precision",
    "seed": "trainer.seed",
    "margin": "objective.margin",
    "reward_func": "reward.path",
}


@dataclass(frozen=True)
class Answer:
    """One sampled response."""

    text: str  # without end and padding tokens; a stop string stays
    tokens: list[int]
    logprob: float  # of all its tokens, nats, under softmax(logits / temperature)
    finish_reason: str  # `stop`: an end token or a stop string; `length`: cut off


def sample(
    model: str | nn.Module | None,
    prompts: list[str | Messages],
    n: int = 8,
    sampling: Sampling | None = None,
    *,
    tokenizer: Any = None,
    device: str | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    seed: int = 0,
    max_slots: int | Literal["auto"] = "auto",
    kv_memory_gib: float | Literal["auto"] = "auto",
    skip_special_tokens: bool = False,
    system_prompt: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    on_group: Callable[[int, list[str]], None] | None = None,
) -> list[list[Answer]]:
    """Return n responses to each prompt, which is a text or a list of {role, content} messages.

    `model` is a folder or a hub name (None: the embedded model), or a loaded model, together with its `tokenizer`. The
    tokenizer's chat template is applied where it has one, with `chat_template_kwargs`; `system_prompt` stands before
    prompts that have none. A response depends on the seed, its prompt's place in the list and its own
    number, and on nothing else that is sampled. `skip_special_tokens` leaves tags that are special
    tokens, such as <think>, out of the texts. `on_group(place, texts)` is called as soon as a
    prompt's last response has ended. Raise UserError.
    """
    _check_number(n)
    cfg = Config()
    cfg.data.system_prompt, cfg.data.chat_template_kwargs = system_prompt, chat_template_kwargs or {}
    cfg.model.precision, cfg.trainer.seed, cfg.rollout.max_slots = precision, seed, max_slots
    cfg.rollout.kv_memory_gib, cfg.rollout.skip_special_tokens = kv_memory_gib, skip_special_tokens
    sampler, encoder = _open(model, tokenizer, device, cfg)
    rows = [_prompt(encoder, i, prompt, f"prompt {i + 1}") for i, prompt in enumerate(prompts)]
    notify = None if on_group is None else lambda place, prompt, texts, reasons: on_group(place, texts)
    return _answers(sampler.generate(rows, n, sampling or Sampling(), purpose=EVAL, on_group=notify))


def _open(model: str | nn.Module | None, tokenizer: Any, device: str | None, cfg: Config) -> tuple[Sampler, Encoder]:
    """Open the model and its tokenizer. Raise UserError."""
    on = torch.device(device) if device else choose_device()
    if not isinstance(model, nn.Module):
        config = load_model_config(base_of(model))
        tokenizer = tokenizer or load_tokenizer(model, cfg.data.chat_template)
        chosen, _ = choose_precision(cfg.model.precision, on, config)
        model = load_policy(model, DTYPES[chosen]).to(on)
    elif tokenizer is None:
        raise UserError("sample() was given a loaded model without its tokenizer: pass tokenizer=...")
    data, rollout = cfg.data, cfg.rollout
    check_template_kwargs(tokenizer, data.chat_template_kwargs)
    vocab_size = model.config.get_text_config().vocab_size
    encoder = Encoder(tokenizer, data.system_prompt, data.chat_template_kwargs, vocab_size)
    sampler = Sampler(
        model,
        tokenizer,
        on,
        engine=rollout.engine,
        max_slots=rollout.max_slots,
        kv_memory_gib=rollout.kv_memory_gib,
        seed=cfg.trainer.seed,
        skip_special_tokens=rollout.skip_special_tokens,
    )
    return sampler, encoder


def _check_number(n: int) -> None:
    """Raise UserError unless n is at least 1."""
    if n < 1:
        raise UserError(f"n = {n}: at least 1 response per prompt is needed.")


@contextmanager
def _open_answers(path: Path, source: str) -> Iterator[TextIO]:
    """Open the file of answers; it is `<path>.part` until all are written. Raise UserError where it cannot be written,
    or is the file of prompts."""
    check_path(str(path), "ANSWERS", written=True)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file for the answers.")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise UserError(f"{path}: the answers would replace their own prompts; name another file.")
    with contextlib.ExitStack() as files:
        try:
            part = files.enter_context(replacing(path, keep_unfinished=True))
            out = files.enter_context(part.open("w", encoding="utf-8", errors="backslashreplace"))
        except OSError as e:
            raise UserError(f"{path}: cannot be written ({e.strerror}); name a file in a folder that is there.") from e
        yield out


def _row(source: Source, i: int) -> dict[str, Any]:
    """Return a row of the file of prompts. Raise UserError where it is no object."""
    row = source[i]
    if not isinstance(row, dict):
        raise UserError(f"{source.place(i)}: a row is an object with a `prompt`, and this is a {type(row).__name__}.")
    return row


def _prompt(encoder: Encoder, number: int, prompt: str | Messages, place: str, tools: Any = None) -> Prompt:
    """Encode a prompt. Raise UserError, which names the place."""
    messages = read_messages(prompt, place)
    return Prompt(number, encoder.ids(messages, place, read_tools(tools, place)), "", "", "")


def _prompt_of_row(encoder: Encoder, number: int, row: dict[str, Any], place: str) -> Prompt:
    """Encode the prompt of a row. Raise UserError, which names the place."""
    row = with_our_fields(published_row(row, place), place, guess_truth=False)
    require_prompt(row, place)
    return _prompt(encoder, number, prompt_of(row.get("prompt")), place, row.get("tools"))


def _scored_prompt(encoder: Encoder, number: int, row: dict[str, Any], place: str) -> Prompt:
    """Encode the prompt of a row with all that a reward function gets. Raise UserError, which names the place."""
    messages, truth, data_source, extra = parse_row(row, place, needs_truth=False)
    ids = encoder.ids(messages, place, read_tools(row.get("tools"), place))
    return Prompt(number, ids, question_of(messages), truth, data_source, extra)


def _answers(rollout: Rollout) -> list[list[Answer]]:
    """Return the responses of a rollout, G x N."""
    lengths, tokens, sums = rollout.lengths.tolist(), rollout.tokens.tolist(), rollout.logprobs.sum(-1).tolist()
    return [
        [Answer(text, ids[:length], logprob, reason) for text, ids, length, logprob, reason in zip(*group, strict=True)]
        for group in zip(rollout.texts, tokens, lengths, sums, rollout.finish_reasons, strict=True)
    ]


def _check_scored(source: Source, encoder: Encoder, cfg: Config) -> None:
    """Check all rows as training does, before anything is sampled, and say what is read of them. Raise UserError."""
    checker = RowChecker(encoder, NO_LIMIT, only_texts=cfg.reward.path is None)
    for i, row in enumerate(source.rows()):
        checker(row, source.place(i))
    say_fields([checker], own_function=cfg.reward.path is not None)


def open_prompts(name: str) -> Source:
    """Open PROMPTS: a file, a data set, or `embedded[@split]`. Raise UserError where it cannot be read."""
    word, _, split = name.partition("@")
    if word != EMBEDDED or Path(name).exists():
        return open_source(name)
    if (split or "train") not in EMBEDDED_FILE:
        raise UserError(f"PROMPTS = {name!r}: the embedded equations have the splits {', '.join(EMBEDDED_FILE)}.")
    path = DATA_DIR / EMBEDDED_FILE[split or "train"]
    if not path.exists():
        equations.write_splits()
    return open_source(path)


def with_responses(row: dict[str, Any], texts: list[str], rewards: list[float], reasons: list[str]) -> dict[str, Any]:
    """Return the row with its scored responses, as rollout.source=rows reads them."""
    return {**row, "responses": texts, "rewards": rewards, "finish_reasons": reasons}


def with_pair(row: dict[str, Any], texts: list[str], rewards: list[float], margin: float) -> dict[str, Any] | None:
    """Return the row with its best response as `chosen` and its worst as `rejected`, the first among equals; None where
    their rewards do not differ by more than the margin."""
    best, worst = max(rewards), min(rewards)
    if not best - worst > margin + TOLERANCE:
        return None
    return {**row, "chosen": texts[rewards.index(best)], "rejected": texts[rewards.index(worst)]}


def _written_rows(
    rows: list[dict[str, Any]], rollout: Rollout, scorer: Scorer | None, margin: float | None, tokenizer: Any
) -> Rows:
    """Yield what is written for each row: its answers and the prompt as the model was given it, its scored responses,
    or, with a margin, its pair if it has one."""
    if scorer is None:
        for row, prompt, group in zip(rows, rollout.prompts, _answers(rollout), strict=True):
            given = tokenizer.decode(list(prompt.ids), clean_up_tokenization_spaces=False)
            yield {**row, "model_input": given, "answers": [asdict(answer) for answer in group]}
        return
    rewards = scorer(rollout).rewards.double().tolist()
    for row, texts, scores, reasons in zip(rows, rollout.texts, rewards, rollout.finish_reasons, strict=True):
        scores = [round(reward, 6) for reward in scores]
        found = with_responses(row, texts, scores, reasons) if margin is None else with_pair(row, texts, scores, margin)
        if found is not None:
            yield found


def _arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m gspo.sample", description=__doc__, formatter_class=HelpText)
    parser.add_argument("model", help="checkpoint, run, HF folder or name; embedded: the embedded model")
    parser.add_argument("prompts", help="file of rows, or a data set owner/name[:config][@split]")
    parser.add_argument("answers", type=Path, help="JSONL file to write")
    parser.add_argument("--n", type=int, help="responses per prompt (default: 8)")
    parser.add_argument("--temperature", type=float, help="0: the likeliest token (default: 0.9)")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--min_p", type=float)
    parser.add_argument("--max_new_tokens", type=int, help="longest response (default: 512)")
    parser.add_argument("--stop", nargs="+", metavar="TEXT", help="stop strings: they end a response")
    parser.add_argument(
        "--skip_special_tokens", action="store_true", default=None, help="leave tags such as <think> out of the texts"
    )
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--kv_memory_gib", type=float, help="memory of the KV cache (default: half of the free)")
    parser.add_argument("--score", action="store_true", help="write responses with their rewards, to learn from")
    parser.add_argument("--pairs", action="store_true", help="write the best and the worst response of each prompt")
    parser.add_argument("--margin", type=float, help="rewards that differ by less are no pair (default: 0.1)")
    parser.add_argument("--reward_func", metavar="PATH", help="Python file with compute_score (default: ours)")
    return parse_with_settings(parser, SETTINGS, "sampling")


def _take_prompt_format(cfg: Config, run: Path, given: set[str]) -> None:
    """Set the system prompt and template arguments of the run with this config.yaml, but what was given."""
    try:
        stored = load_config(run)
    except UserError as e:  # of another version: its weights can be sampled from all the same
        return say(f"note: the run's system prompt and template arguments are not known: {e}")
    for name in ("system_prompt", "chat_template_kwargs"):
        value = getattr(stored.data, name)
        if value and f"data.{name}" not in given:
            setattr(cfg.data, name, value)
            say(f"data.{name} is the run's: {value!r:.200}")


def _configure(a: argparse.Namespace, model: str | None) -> Config:
    """Return the configuration: the defaults, a run's prompt format where the model is its checkpoint, the settings and
    the flags. UserError where a flag and a setting say the same thing."""
    cfg, given = load_config(None, a.settings, note=say), keys_of(a.settings)
    if model and (run := config_of(model)):
        _take_prompt_format(cfg, run, given)
    for flag, key in FLAGS.items():
        if (value := getattr(a, flag)) is None:
            continue
        if key in given:
            raise UserError(f"--{flag} and {key} are the same; leave one of the two out.")
        section, name = key.split(".")
        setattr(getattr(cfg, section), name, value)  # a temperature of 0, which no run can have, is one of these
    return cfg


def _refuse_idle(a: argparse.Namespace, n: int) -> None:
    """Raise UserError where something was given that has no effect on what is written."""
    reward = next((text for text in a.settings if any(key.startswith("reward.") for key in keys_of([text]))), "")
    reward = "--reward_func" if a.reward_func else reward
    margin = next((text for text in a.settings if "objective.margin" in keys_of([text])), "")
    margin = "--margin" if a.margin is not None else margin
    if reward and not (a.score or a.pairs):
        raise UserError(
            f"{reward} has no effect without --score or --pairs: nothing is scored. Add one, or leave it out."
        )
    if margin and not a.pairs:
        raise UserError(f"{margin} has no effect without --pairs: no pairs are made. Add that, or leave it out.")
    if a.score and a.pairs:
        raise UserError("--score and --pairs write different rows; give one of the two.")
    if a.pairs and n < 2:
        raise UserError(f"--pairs with {n} response per prompt makes no pair. Give --n 2 or more.")


def main() -> None:
    a = _arguments()
    if not a.model.strip():
        raise UserError(
            "MODEL is an empty text (a variable of the shell that is not set?). Give a model; the word `embedded` "
            "means the embedded one."
        )
    check_path(a.model, "MODEL")
    model = None if a.model == EMBEDDED and not Path(EMBEDDED).exists() else checkpoint_of(a.model)
    cfg, scores, written = _configure(a, model), a.score or a.pairs, 0
    _check_number(cfg.eval.n)
    _refuse_idle(a, cfg.eval.n)
    sampling, source = Sampling.of(cfg.rollout), open_prompts(a.prompts)
    named = RenamedRows(source, cfg.data.prompt_key, cfg.data.truth_key if scores else None)
    scorer = Scorer(cfg.reward) if scores else None
    with _open_answers(a.answers, a.prompts) as out:
        with called("MODEL"):
            sampler, encoder = _open(model, None, None, cfg)
        if scores:
            _check_scored(named, encoder, cfg)
        for at in range(0, len(source), ROWS_AT_ONCE):
            rows = [_row(source, i) for i in range(at, min(at + ROWS_AT_ONCE, len(source)))]
            read = _scored_prompt if scores else _prompt_of_row
            prompts = [read(encoder, i, _row(named, i), source.place(i)) for i in range(at, at + len(rows))]
            rollout = sampler.generate(prompts, cfg.eval.n, sampling, purpose=EVAL)
            margin = cfg.objective.margin if a.pairs else None
            for row in _written_rows(rows, rollout, scorer, margin, sampler.tokenizer):
                out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                written += 1
    without = f"; {len(source) - written:,} have no pair and are left out" if a.pairs else ""
    say(f"{a.answers}: {len(source):,} prompts, {cfg.eval.n} responses each{without}")


if __name__ == "__main__":
    guarded(main)

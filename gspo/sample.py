"""Sample N responses to each of a list of prompts from any Hugging Face causal language model.

    python -m gspo.sample MODEL PROMPTS ANSWERS.jsonl [--n 8 --temperature 0.9 --max_new_tokens 512 --stop TEXT ...]

PROMPTS is a JSON, JSONL or parquet file of rows, or a data set, with a `prompt`: a text, or a list of {role, content}
messages. Every row is written with its `answers`, in the same order. The file is called ANSWERS.jsonl.part until
the last row is written. In Python: `sample`.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from torch import nn

from gspo.checkpoint.run_folder import checkpoint_of
from gspo.data.encoding import Encoder
from gspo.data.messages import Messages, read_messages, read_tools
from gspo.data.prompts import EMBEDDED
from gspo.data.sources import Source, open_source
from gspo.errors import UserError
from gspo.models.loading import load_model, load_model_config, load_tokenizer
from gspo.models.precision import DTYPES, choose_precision
from gspo.read_paths import check_path
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import EVAL, Sampler
from gspo.system.console import say
from gspo.system.devices import choose_device
from gspo.system.files import replacing
from gspo.system.program import guarded
from gspo.types import Prompt, Rollout

ROWS_AT_ONCE = 1024  # rows that are sampled, and then written, together


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
    on_group: Callable[[int, list[str]], None] | None = None,
) -> list[list[Answer]]:
    """Return n responses to each prompt, which is a text or a list of {role, content} messages.

    `model` is a folder or a hub name (None: the embedded model), or a loaded model, together with its `tokenizer`. The
    tokenizer's chat template is applied where it has one. A response depends on the seed, its prompt's place in the
    list and its own number, and on nothing else that is sampled. `skip_special_tokens` leaves tags that are special
    tokens, such as <think>, out of the texts. `on_group(place, texts)` is called as soon as a
    prompt's last response has ended. Raise UserError.
    """
    _check_number(n)
    sampler, encoder = _open(model, tokenizer, device, precision, max_slots, kv_memory_gib, seed, skip_special_tokens)
    rows = [_prompt(encoder, i, prompt, f"prompt {i + 1}") for i, prompt in enumerate(prompts)]
    notify = None if on_group is None else lambda place, prompt, texts, reasons: on_group(place, texts)
    return _answers(sampler.generate(rows, n, sampling or Sampling(), purpose=EVAL, on_group=notify))


def _open(
    model: str | nn.Module | None,
    tokenizer: Any,
    device: str | None,
    precision: str,
    max_slots: int | Literal["auto"],
    kv_memory_gib: float | Literal["auto"],
    seed: int,
    skip_special_tokens: bool,
) -> tuple[Sampler, Encoder]:
    """Open the model and its tokenizer. Raise UserError."""
    on = torch.device(device) if device else choose_device()
    if not isinstance(model, nn.Module):
        config, tokenizer = load_model_config(model), tokenizer or load_tokenizer(model)
        chosen, _ = choose_precision(precision, on, config)
        model = load_model(model, DTYPES[chosen]).to(on)
    elif tokenizer is None:
        raise UserError("sample() was given a loaded model without its tokenizer: pass tokenizer=...")
    encoder = Encoder(tokenizer, vocab_size=model.config.get_text_config().vocab_size)
    options = {"max_slots": max_slots, "kv_memory_gib": kv_memory_gib, "seed": seed}
    return Sampler(model, tokenizer, on, **options, skip_special_tokens=skip_special_tokens), encoder


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


def _answers(rollout: Rollout) -> list[list[Answer]]:
    """Return the responses of a rollout, G x N."""
    lengths, tokens, sums = rollout.lengths.tolist(), rollout.tokens.tolist(), rollout.logprobs.sum(-1).tolist()
    return [
        [Answer(text, ids[:length], logprob, reason) for text, ids, length, logprob, reason in zip(*group, strict=True)]
        for group in zip(rollout.texts, tokens, lengths, sums, rollout.finish_reasons, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gspo.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="checkpoint, run, HF folder or name; embedded: the embedded model")
    parser.add_argument("prompts", help="file of rows, or a data set owner/name[:config][@split]")
    parser.add_argument("answers", type=Path, help="JSONL file to write")
    parser.add_argument("--n", type=int, default=8, help="responses per prompt (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.9, help="0: the likeliest token (default: %(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--min_p", type=float, default=0.0)
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest response (default: %(default)s)")
    parser.add_argument("--stop", nargs="+", default=(), metavar="TEXT", help="stop strings: they end a response")
    parser.add_argument(
        "--skip_special_tokens", action="store_true", help="leave tags such as <think> out of the texts"
    )
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv_memory_gib", type=float, help="memory of the KV cache (default: half of the free)")
    a = parser.parse_args()
    _check_number(a.n)
    if not a.model.strip():
        raise UserError(
            "MODEL is an empty text (a variable of the shell that is not set?). Give a model; the word `embedded` "
            "means the embedded one."
        )
    check_path(a.model, "MODEL")
    sampling = Sampling(a.temperature, a.top_k, a.top_p, a.min_p, a.max_new_tokens, tuple(a.stop))
    source = open_source(a.prompts)
    with _open_answers(a.answers, a.prompts) as out:
        model = None if a.model == EMBEDDED and not Path(EMBEDDED).exists() else checkpoint_of(a.model)
        memory, skips = a.kv_memory_gib or "auto", a.skip_special_tokens
        sampler, encoder = _open(model, None, None, a.precision, "auto", memory, a.seed, skips)
        for at in range(0, len(source), ROWS_AT_ONCE):
            rows = [_row(source, i) for i in range(at, min(at + ROWS_AT_ONCE, len(source)))]
            prompts = [
                _prompt(encoder, at + k, row.get("prompt"), source.place(at + k), row.get("tools"))
                for k, row in enumerate(rows)
            ]
            rollout = sampler.generate(prompts, a.n, sampling, purpose=EVAL)
            for row, group in zip(rows, _answers(rollout), strict=True):
                answers = [asdict(answer) for answer in group]
                out.write(json.dumps({**row, "answers": answers}, ensure_ascii=False, default=str) + "\n")
    say(f"{a.answers}: {len(source):,} prompts, {a.n} responses each")


if __name__ == "__main__":
    guarded(main)

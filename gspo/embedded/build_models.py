"""Rebuild an embedded model, bit for bit: `python -m gspo.embedded.build_models --task systems`; `make base-model`.

A 0.6 M-parameter Llama is trained, supervised, on worked solutions with right ones and usual mistakes mixed
(`worked_solution` of the task). It can then calculate but often picks the wrong operation: self-play can correct that.

The bits are the same on x86-64 with AVX2 and the pinned torch: vendor libraries are restricted to AVX2 code paths and a
fixed number of threads, whatever the machine offers.
"""

import os

PINNED = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"}
os.environ.update(PINNED)  # before torch is imported, or it has no effect

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import random  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from gspo.embedded import brackets, equations, sorting, systems, weekdays  # noqa: E402
from gspo.embedded.task import LANGUAGES, Task  # noqa: E402
from gspo.system.help_text import HelpText  # noqa: E402

SPECIALS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, END = 0, 1
VOCAB = 352
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class WarmStart:
    """What a model learns from, how long, and how it is stored."""

    task: Task
    steps: int
    batch: int
    max_new_tokens: int
    threads: int = 1
    dtype: torch.dtype = torch.bfloat16  # half the bytes of float32


WARM_STARTS = {
    "equations": WarmStart(equations.TASK, 4200, 144, max_new_tokens=48, threads=2, dtype=torch.float32),
    "systems": WarmStart(systems.TASK, 1500, 64, max_new_tokens=64, dtype=torch.float32),
    "sorting": WarmStart(sorting.TASK, 1100, 32, max_new_tokens=64),
    "weekdays": WarmStart(weekdays.TASK, 700, 32, max_new_tokens=64),
    "brackets": WarmStart(brackets.TASK, 800, 64, max_new_tokens=32),
}


def build_tokenizer(task: Task, warm: list[Any]) -> PreTrainedTokenizerFast:
    """Train the tokenizer: byte-level BPE, so that any text is readable, with single digits (or brackets)."""
    tokenizer = Tokenizer(models.BPE())
    single = pre_tokenizers.Split(Regex(task.single), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [single, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random("tokenizer")
    texts = []
    for problem in rng.sample(warm, min(4000, len(warm))):
        language = rng.choice(LANGUAGES)
        texts += [task.prompt_text(problem, language, rng), task.worked_solution(problem, language, rng, True)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_batch(
    task: Task, warm_by_shape: list[list[Any]], tokenizer: PreTrainedTokenizerFast, size: int, rng: random.Random
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return `size` conversations as two (ids [B, T], labels [B, T]), short and long; only answers have labels."""
    prompts, answers = [], []
    for _ in range(size):
        problem = rng.choice(rng.choice(warm_by_shape))
        language = rng.choice(LANGUAGES)
        prompts.append(f"<|user|>{task.prompt_text(problem, language, rng)}<|assistant|>")
        answers.append(task.worked_solution(problem, language, rng, True) + "<|end|>")
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    pairs = sorted(zip(prompt_ids, answer_ids, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))
    halves = []
    for half in (pairs[: size // 2], pairs[size // 2 :]):
        width = max(len(p) + len(a) for p, a in half)
        ids = torch.full((len(half), width), PAD)
        labels = torch.full((len(half), width), -100)
        for i, (p, a) in enumerate(half):
            ids[i, : len(p) + len(a)] = torch.tensor(p + a)
            labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
        halves.append((ids, labels))
    return halves


def warm_start(
    task: Task, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, warm: list[Any], steps: int, batch: int
) -> None:
    """Train on next-token cross-entropy with AdamW, a warm-up and a cosine to zero."""
    by_shape: dict[str, list[Any]] = {}
    for problem in warm:
        by_shape.setdefault(problem.shape, []).append(problem)
    shapes = [by_shape[name] for name in sorted(by_shape)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random("warm start")
    bar = tqdm(range(steps), desc="warm start", mininterval=2.0)
    for step in bar:
        progress = step / steps
        lr = 2e-3 * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        halves = build_batch(task, shapes, tokenizer, batch, rng)
        tokens = sum(int((labels >= 0).sum()) for _, labels in halves)
        optimizer.zero_grad(set_to_none=True)
        mean_loss = 0.0
        for ids, labels in halves:
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") / tokens
            loss.backward()
            mean_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{mean_loss:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gspo.embedded.build_models",
        description=__doc__,
        formatter_class=HelpText,
    )
    parser.add_argument("--task", choices=WARM_STARTS, default="equations")
    parser.add_argument("--out", type=Path, help="default: where the model ships")
    parser.add_argument("--steps", type=int, help="default: as the model that ships")
    parser.add_argument("--batch", type=int, help="default: as the model that ships")
    args = parser.parse_args()
    plan = WARM_STARTS[args.task]
    task = plan.task
    out = args.out or task.model_dir
    torch.set_num_threads(plan.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    warm = task.split_problems()["warm"]
    tokenizer = build_tokenizer(task, warm)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    warm_start(task, model, tokenizer, warm, args.steps or plan.steps, args.batch or plan.batch)
    model.generation_config = GenerationConfig(
        eos_token_id=END, pad_token_id=PAD, do_sample=True, temperature=0.9, max_new_tokens=plan.max_new_tokens
    )
    out.mkdir(parents=True, exist_ok=True)
    model.to(plan.dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = sum(p.numel() for p in model.parameters())
    print(json.dumps({"parameters": size, "out": str(out)}))


if __name__ == "__main__":
    main()

"""Rebuild the embedded base model, bit for bit: `make base-model`, under 20 minutes on two cores.

A supervised warm start of a 0.6 M-parameter Llama on worked solutions, right ones and usual mistakes mixed
(`equations.worked_solution`). The result can calculate but often picks the wrong operation: self-play can mend that.

Bit for bit is meant for x86-64 with AVX2 and the pinned torch: vendor libraries are held to AVX2 code paths and two
threads, whatever the machine offers.
"""

import os

PINNED = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"}
os.environ.update(PINNED)  # before torch is imported, or it has no effect

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import random  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from gspo.embedded import MODEL_DIR  # noqa: E402
from gspo.embedded.equations import Equation, prompt_text, split_equations, worked_solution  # noqa: E402

SPECIALS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, END = 0, 1
VOCAB = 352
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(warm: list[Equation]) -> PreTrainedTokenizerFast:
    """Byte-level BPE (any text is readable) whose digits stay single, as arithmetic wants them."""
    tokenizer = Tokenizer(models.BPE())
    split_digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split_digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
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
    for equation in rng.sample(warm, 4000):
        language = rng.choice(("en", "zh"))
        texts += [prompt_text(equation, language, rng), worked_solution(equation, language, rng, mistakes=True)]
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
    warm_by_shape: list[list[Equation]], tokenizer: PreTrainedTokenizerFast, size: int, rng: random.Random
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`size` conversations -> two (ids [B, T], labels [B, T]), short ones and long ones; labels are on the answers."""
    prompts, answers = [], []
    for _ in range(size):
        equation = rng.choice(rng.choice(warm_by_shape))
        language = rng.choice(("en", "zh"))
        prompts.append(f"<|user|>{prompt_text(equation, language, rng)}<|assistant|>")
        answers.append(worked_solution(equation, language, rng, mistakes=True) + "<|end|>")
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
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, warm: list[Equation], steps: int, batch: int
) -> None:
    """AdamW with warm-up and a cosine to zero; plain next-token cross-entropy."""
    by_shape: dict[str, list[Equation]] = {}
    for equation in warm:
        by_shape.setdefault(equation.shape, []).append(equation)
    shapes = [by_shape[name] for name in sorted(by_shape)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random("warm start")
    bar = tqdm(range(steps), desc="warm start", mininterval=2.0)
    for step in bar:
        progress = step / steps
        lr = 2e-3 * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        halves = build_batch(shapes, tokenizer, batch, rng)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--batch", type=int, default=144)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    warm = split_equations()["warm"]
    tokenizer = build_tokenizer(warm)
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
    warm_start(model, tokenizer, warm, args.steps, args.batch)
    model.generation_config = GenerationConfig(
        eos_token_id=END, pad_token_id=PAD, do_sample=True, temperature=0.9, max_new_tokens=48
    )
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    size = sum(p.numel() for p in model.parameters())
    print(json.dumps({"parameters": size, "out": str(args.out)}))


if __name__ == "__main__":
    main()

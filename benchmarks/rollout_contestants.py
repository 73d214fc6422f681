"""Define the samplers that rollout.py and rollout_cuda.py compare, their prompts, and the clock."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import Sampler
from gspo.types import Prompt

N, PROMPTS, TAIL_PROMPTS, TAIL_SLOTS, TEMPERATURE = 8, 8, 16, 32, 0.9


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Return the median time of a call: wall-clock, or CPU time with one thread and no CUDA."""
    cuda = torch.cuda.is_available()
    now = time.process_time if torch.get_num_threads() == 1 and not cuda else time.perf_counter
    taken = []
    for _ in range(repeats):
        began = now()
        work()
        if cuda:
            torch.cuda.synchronize()
        taken.append(now() - began)
    return statistics.median(taken)


def draw(count: int, size: int, vocabulary: int) -> list[Prompt]:
    """Draw `count` prompts of `size` random tokens."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary // 10, vocabulary, (count, size), generator=g).tolist()
    return [Prompt(i, tuple(row), "", "", "") for i, row in enumerate(ids)]


# ---- the contestants: each samples N responses to every prompt, of `lengths` [G, N] tokens ----


def generate(model: nn.Module, prompts: list[Prompt], lengths: Tensor, rows: int) -> None:
    """Sample with transformers' generate, in batches of `rows` responses that take as long as their longest."""
    ids = torch.tensor([p.ids for p in prompts], device=model.device).repeat_interleave(lengths.shape[1], 0)
    for part, wanted in zip(ids.split(rows), lengths.flatten().split(rows), strict=True):
        longest = int(wanted.max())
        settings = GenerationConfig(
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            max_new_tokens=longest,
            min_new_tokens=longest,
            pad_token_id=0,
        )
        model.generate(part, attention_mask=torch.ones_like(part), generation_config=settings)


def generate_batch(model: nn.Module, prompts: list[Prompt], lengths: Tensor, rows: int) -> None:
    """Sample with transformers' continuous batching, which takes one length for all responses."""
    settings = GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        max_new_tokens=int(lengths.max()),
        eos_token_id=-1,
        pad_token_id=0,
    )
    inputs = [list(p.ids) for p in prompts for _ in range(lengths.shape[1])]
    answers = model.generate_batch(inputs, generation_config=settings, progress_bar=False)
    assert sum(len(a.generated_tokens) for a in answers.values()) == len(inputs) * int(lengths.max())


def ours(sampler: Sampler, prompts: list[Prompt], lengths: Tensor, rows: int) -> None:
    """Sample with our engine, `rows` responses at a time."""
    sampler.engine.options.max_slots = rows
    sampling = Sampling(TEMPERATURE, max_new_tokens=int(lengths.max()))
    got = sampler.generate(prompts, lengths.shape[1], sampling, limits=lengths)
    assert got.lengths.cpu().equal(lengths)

"""Samples on the CPU as CUDA does, in blocks of steps, every kernel in Triton's interpreter; prints what differs."""

import json

import torch
from architectures import tiny_model
from interpreted_logprob import repair_interpreter, use_triton
from tiny_sampler import LIMITS, prompts_of, sampler_for

from gspo.kernels import decode_attention, draw_token
from gspo.rollout import paged_engine
from gspo.rollout.draw_tokens import Sampling


def sampled(family: str, dtype: torch.dtype, sampling: Sampling):
    sampler = sampler_for(tiny_model(family).to(dtype), max_slots=5)
    sampler.end_ids = set(range(1, 8))
    return sampler.generate(prompts_of((3, 21, 1, 7)), 3, sampling, limits=LIMITS)


def main() -> None:
    repair_interpreter()
    runs = [("gemma2", torch.float32, Sampling(1.2, max_new_tokens=14, top_k=40)),
            ("qwen3", torch.float32, Sampling(0.0, max_new_tokens=14))]  # fmt: skip
    plain = [sampled(*run) for run in runs]
    use_triton(decode_attention)
    use_triton(draw_token)
    paged_engine.STEPS_PER_BLOCK["cpu"] = 4
    results = {}
    for (family, *_), theirs, mine in zip(runs, plain, [sampled(*run) for run in runs], strict=True):
        same = all(getattr(mine, k).equal(getattr(theirs, k)) for k in ("tokens", "lengths", "finished"))
        off = max(
            float((a - b).abs().max()) for a, b in ((mine.logprobs, theirs.logprobs), (mine.entropy, theirs.entropy))
        )
        results[family] = {"same": same, "off": off, "lengths": mine.lengths.unique().numel()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()

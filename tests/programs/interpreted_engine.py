"""Samples on the CPU as CUDA does, in blocks of steps, every kernel in Triton's interpreter; prints what differs."""

import json
from dataclasses import replace

import torch
from architectures import tiny_model
from interpreted_logprob import repair_interpreter, use_triton
from tiny_sampler import LIMITS, prompts_of, sampler_for

from gspo.kernels import decode_attention, draw_token, norm_gate_rotary, write_tokens
from gspo.models import kernel_layers
from gspo.rollout import paged_engine, shared_products
from gspo.rollout.draw_tokens import Sampling


def sampled(family: str, dtype: torch.dtype, sampling: Sampling):
    sampler = sampler_for(tiny_model(family).to(dtype), max_slots=5)
    sampler.end_ids = set(range(1, 8))
    joined = len(shared_products._JOINED.get(sampler.model, []))
    return sampler.generate(prompts_of((3, 21, 1, 7)), 3, sampling, limits=LIMITS), joined


def main() -> None:
    repair_interpreter()
    runs = [("gemma2", torch.float32, Sampling(1.2, max_new_tokens=14, top_k=40)),
            ("qwen3", torch.float32, Sampling(0.0, max_new_tokens=14))]  # fmt: skip
    plain = [sampled(*run) for run in runs]
    for operation in (decode_attention, draw_token, norm_gate_rotary, write_tokens):
        use_triton(operation)
    kernel_layers.SUMS_ON.add("cpu")
    shared_products.JOINED_ON.add("cpu")
    paged_engine.PACES["cpu"] = replace(paged_engine.PACES["cuda"], steps=4)
    results = {}
    for (family, *_), (theirs, _), (mine, joined) in zip(runs, plain, [sampled(*run) for run in runs], strict=True):
        same = all(getattr(mine, k).equal(getattr(theirs, k)) for k in ("tokens", "lengths", "finished"))
        off = max(
            float((a - b).abs().max()) for a, b in ((mine.logprobs, theirs.logprobs), (mine.entropy, theirs.entropy))
        )
        results[family] = {"same": same, "off": off, "lengths": mine.lengths.unique().numel(), "joined": joined}
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""Write rows that name their place, before and after they move between ranks. Started by test_balance.py.

torchrun --nproc_per_node=K tests/programs/balanced_rows.py OUT.json
"""

import json
import math
import sys
from pathlib import Path

import torch

from gspo.distributed.world import process_group
from gspo.packing.balance import balance
from gspo.system.program import end_process
from gspo.types import Prompt, Rollout, Scores

CASES = {  # name -> (prompt lengths, lengths of two answers to each, mini-batches)
    "ragged": ([3, 1, 2, 9, 1, 1, 4], [[7, 1], [2, 2], [1, 1], [6, 9], [1, 2], [3, 1], [8, 8]], 1),
    "mini-batches": ([1] * 8, [[9, 9], [1, 1], [1, 2], [8, 9], [2, 1], [9, 7], [1, 1], [1, 3]], 2),
    "fewer groups than ranks": ([2, 5], [[1, 1], [3, 4]], 1),
    "one group": ([2], [[3, 5]], 2),
    "one long": ([1] * 5, [[40, 40], [1, 1], [1, 1], [1, 1], [1, 1]], 1),
}


def scored(case, places):
    """These places of the case's batch, no wider than they need: every number and text tells where it belongs."""
    sizes, lengths = CASES[case][0], torch.tensor(CASES[case][1])[places].view(-1, 2)
    width = int(lengths.max()) if places else 0
    at = torch.tensor(places, dtype=torch.long)[:, None] * 100 + torch.tensor([0, 50])  # [G, 2]
    tokens = (at[..., None] + torch.arange(width)) * (torch.arange(width) < lengths[..., None])
    prompts = [Prompt(p, tuple(range(sizes[p])), f"p{p}", f"gold {p}", "src", {"solution": f"s{p}"}) for p in places]
    texts = [[f"{p}a\n", f"{p}b"] for p in places]
    copied, prefilled = lengths * (at % 2), at[:, 0] + 7
    rollout = Rollout(prompts, tokens, lengths, tokens / -8, tokens / 16, at % 3 == 0, texts, at > 1, copied, prefilled)
    parts = {"all": at / 1000} if places else {}
    if any(p % 3 == 1 for p in places):  # what only some ranks know of
        parts["some"] = torch.where(at // 100 % 3 == 1, at / 500, torch.nan)
    skipped = [g for g, p in enumerate(places) if p in (1, 3)]
    predictions = [[f"is {p}", None] for p in places]
    return rollout, Scores(at / 2000, parts, predictions, skipped, f"from {places}", len(places), 1, 10 * len(places))


def rows(places, r, s):
    """{place: all that is known of the group}; padding must be zero."""
    assert not r.tokens[~r.mask].any() and not r.logprobs[~r.mask].any() and not r.entropy[~r.mask].any()
    assert r.tokens.shape[2] == (int(r.lengths.max()) if places else 0), "no wider than needed"
    found = {}
    for g, place in enumerate(places):
        p, lengths = r.prompts[g], r.lengths[g].tolist()
        known = {name: [None if math.isnan(x) else x for x in v[g].tolist()] for name, v in s.parts.items()}
        found[place] = {
            "prompt": [p.id, list(p.ids), p.text, p.ground_truth, p.extra_info],
            "texts": r.texts[g],
            "finished": r.finished[g].tolist(),
            "branches": [r.sampled[g].tolist(), r.copied[g].tolist(), int(r.prefilled[g])],
            **{k: [x[:n].tolist() for x, n in zip(getattr(r, k)[g], lengths, strict=True)]
               for k in ("tokens", "logprobs", "entropy")},
            "rewards": s.rewards[g].tolist(),
            "parts": {name: values for name, values in known.items() if values != [None, None]},
            "predictions": s.predictions[g],
            "skipped": g in s.skipped,
        }  # fmt: skip
    return found


def main() -> None:
    result = {}
    with process_group() as world:
        for case, (sizes, _, minibatches) in CASES.items():
            places = world.places(len(sizes))
            there, rollout, scores, share = balance(places, *scored(case, places), minibatches, world)
            counters = [scores.first_fault, scores.errors, scores.timeouts, scores.calls]
            result[case] = world.gather([there, list(rows(there, rollout, scores).items()), counters, share])
        if world.is_main:
            Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    end_process()

"""Time scoring in parallel and during sampling, beside calling the reward function one response after another.

python benchmarks/reward.py        (make bench-reward)
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import heading, table
from gspo.config import Config, Reward
from gspo.data.prompts import load_splits
from gspo.models.loading import load_model, load_tokenizer
from gspo.reward import reward_func
from gspo.reward.scorer import Scorer
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import Sampler
from gspo.types import Prompt

SLOW = "import time\ndef compute_score(**_):\n    time.sleep(0.01)\n    return 1.0\n"
PROMPT = Prompt(0, (1,), "", "7", "benchmark")


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the median time of a few calls."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def ten_milliseconds(path: Path) -> str:
    """Time 256 calls that wait ten milliseconds each."""
    rows, texts = [], [[""] * 256]
    for workers in (1, 2, 4, 8):
        scorer = Scorer(Reward(path=str(path), workers=workers))
        scorer.score_texts([PROMPT], [[""] * workers])
        took = seconds(lambda scorer=scorer: scorer.score_texts([PROMPT], texts), 3)
        scorer.close()
        rows.append([str(workers), f"{took:.2f}", f"{2.56 / workers:.2f}", f"{2.56 / workers / took:.0%}"])
    return table(["workers", "seconds", "2.56 s / workers", "share of the bound"], rows)


def default_function() -> str:
    """Time 2,048 calls of the default reward: in this process one after another, and in the worker pool."""
    text = "48 / 2 = 24 clips in May, and 48 + 24 = 72 in both months.\n#### 72"
    texts = [[f"In case {i}, {text}" for i in range(2048)]]

    def inline() -> None:
        for response in texts[0]:
            reward_func.score_parts("", response, "72")

    alone = seconds(inline)
    rows = [["in this process, one after another", f"{alone:.3f}", "1.0"]]
    for workers in (1, 2):
        scorer = Scorer(Reward(workers=workers))
        scorer.score_texts([PROMPT], [[""] * workers])
        took = seconds(lambda scorer=scorer: scorer.score_texts([PROMPT], texts))
        scorer.close()
        rows.append([f"{workers} worker{'s' * (workers > 1)}", f"{took:.3f}", f"{took / alone:.1f}"])
    return table(["2,048 calls of the default function", "seconds", "ratio"], rows)


def during_sampling(path: Path) -> str:
    """Time ten-millisecond calls on 256 responses, sampled 32 at a time: after sampling, and during it."""
    config = Config()
    tokenizer, model = load_tokenizer(None), load_model(None)
    prompts = list(load_splits(config, tokenizer, model.config).train[:64])
    sampler = Sampler(model, tokenizer, torch.device("cpu"), max_slots=32)
    sampling = Sampling(0.9, max_new_tokens=64)
    scorer = Scorer(Reward(path=str(path), workers=2))
    scorer.score_texts([PROMPT], [["", ""]])
    rollout = sampler.generate(prompts, 4, sampling)
    sample = seconds(lambda: sampler.generate(prompts, 4, sampling), 3)
    score = seconds(lambda: scorer(rollout), 3)
    together = seconds(lambda: scorer(sampler.generate(prompts, 4, sampling, on_group=scorer.begin)), 3)
    scorer.close()
    hidden = (sample + score - together) / min(sample, score)
    row = [f"{x:.2f}" for x in (sample, score, sample + score, together)]
    return table(["sampling", "scoring", "one after the other", "overlapped", "hidden"], [[*row, f"{hidden:.0%}"]])


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slow.py"
        path.write_text(SLOW)
        print(heading("Scoring", "make bench-reward"))
        print(ten_milliseconds(path))
        print(default_function())
        print(during_sampling(path))


if __name__ == "__main__":
    main()

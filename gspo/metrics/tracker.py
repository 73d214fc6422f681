"""Curves: tensorboard, `metrics.jsonl`, the console line, sample tables, and the warnings of `health.py`.

Nothing here stops a run: what a full disk does not take is written when there is room again.

`GLOSSARY` is the one list of what every metric means; the README's table is printed from it
(`python -m gspo.metrics.tracker`).
"""

import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from gspo.algorithm.pairs import chosen_rejected
from gspo.config import Config
from gspo.metrics.health import HealthCheck
from gspo.metrics.tensorboard_file import Board
from gspo.system.console import say
from gspo.system.files import Growing, write_text
from gspo.system.torchrun import is_main
from gspo.types import Experience

GLOSSARY = {
    "reward_mean": "mean reward of the sampled answers (should rise)",
    "reward_max": "mean over prompts of the best answer's reward (should rise)",
    "preference_accuracy": "share of pairs that the implicit rewards order rightly (healthy above 0.6)",
    "kl_divergence": "KL to the reference, nats per token, k3 estimate (healthy 0.001 to 0.1); 0 when a round begins",
    "ranking_loss": "the ranking term, before its weight is applied (should fall)",
    "reward/correct": "of the default reward: share of right final answers (a list may be half right)",
    "reward/reasoning": "of the default reward: share of the stated calculations that hold",
    "reward/format": "of the default reward: share of answers that are clearly marked",
    "reward/errors": "calls of the reward function that raised, returned no score or took their process with them",
    "reward/timeouts": "calls of the reward function that were ended for taking longer than reward.timeout_s",
    "reward/faults": "share of calls that did either",
    "loss/total": "the loss that is minimised",
    "loss/preference": "its preference term",
    "loss/ranking": "its ranking term, weighted",
    "loss/kl": "its KL term, weighted",
    "loss/nll": "its winners' likelihood term, weighted (off by default)",
    "pairs/per_group": "preference pairs a prompt",
    "pairs/groups_without": "share of prompts whose answers give no pair: nothing to learn from them",
    "pairs/gap_std": "standard deviation over pairs of the implicit reward gap: above 1, the sigmoid saturates",
    "winner_logprob": "log-prob of the answers that beat another, before the update, nats per token",
    "winner_logprob_drop": "its fall since the round began (healthy below 0.2: else likelihood displacement)",
    "response/length_mean": "tokens an answer",
    "response/length_ratio": "tokens an answer / mean over the first three steps (healthy below 1.5)",
    "response/length_max": "longest answer",
    "response/cutoff": "share of answers cut off at max_new_tokens",
    "entropy": "entropy of the sampled distribution, nats per token",
    "entropy_ratio": "entropy / mean over the first three steps (healthy above 0.3, until the task is solved)",
    "grad_norm": "gradient norm before clipping, mean over the step's updates",
    "skipped_updates": "updates skipped because the gradient was not finite",
    "empty_updates": "updates skipped because no answer was better than another: nothing to learn but the KL term",
    "learning_rate": "AdamW step size",
    "round": "self-play round, from 0",
    "win_rate": "once a round: how often answers beat the previous self's on held-out prompts; ties count half",
    "win_rate/ties": "share of ties in it",
    "kl_to_initial": "once a round: KL to the initial model on held-out prompts, nats per token",
    "heldout/reward_mean": "once a round: mean reward on held-out prompts",
    "heldout/accuracy": "with it: share of right answers: those of full reward, or as the function's `acc` says",
    "heldout/diverging": "once a round: rounds in a row in which training reward rose and held-out accuracy fell",
    "mismatch": "mean |sampler - trainer| log-prob of the same token",
    "balance": "tokens trained on by the fullest rank / mean over ranks: 1.0 where no rank waits for another",
    "tokens_per_second": "sampled tokens a second, over the whole step",
    "tokens_per_second/rollout": "... over the seconds of sampling alone",
    "tokens_sampled": "sampled tokens since the start",
    "time/rollout": "seconds sampling",
    "time/reward": "seconds scoring",
    "time/reference": "seconds for the reference's log-probs",
    "time/update": "seconds for forward, backward and optimizer",
    "time/step": "seconds for the whole step",
    "memory/peak_gib": "peak memory: of the GPU, or of the process on CPU",
}
SEED_FIVE = ("reward_mean", "reward_max", "preference_accuracy", "kl_divergence", "ranking_loss")
PAGE = {  # chart title on the custom-scalars page -> (curve, healthy low, healthy high)
    "reward_mean (healthy: rises)": ("reward_mean", None, None),
    "reward_max (healthy: rises)": ("reward_max", None, None),
    "preference_accuracy (healthy: above 0.6)": ("preference_accuracy", "preference_accuracy_min", None),
    "kl_divergence (healthy: 0.001 to 0.1)": ("kl_divergence", "kl_divergence_min", "kl_divergence_max"),
    "ranking_loss (healthy: falls)": ("ranking_loss", None, None),
}


class Tracker:
    """Writes the run's curves. On ranks other than 0 it writes nothing."""

    def __init__(self, folder: Path, cfg: Config, start_step: int):
        self.folder, self.cfg, self.active = folder, cfg, is_main()
        self.health, self.last_line, self.full = HealthCheck(cfg.health), 0.0, False
        if not self.active:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            _cut_after(folder / name, start_step)
        for row in _rows(folder / "metrics.jsonl"):  # a resumed run knows again what it had seen and said
            self.health.check(row)
        self.metrics_file, self.samples_file = (Growing(folder / f"{name}.jsonl") for name in ("metrics", "samples"))
        self.board = Board(folder / "tensorboard", start_step + 1 if start_step else None)
        self.board.page({"GSPO": {title: ["Multiline", _tags(*spec)] for title, spec in PAGE.items()}})

    def log(self, step: int, metrics: dict[str, float], total_steps: int, causes: dict[str, str] | None = None) -> None:
        """One object in metrics.jsonl, one point on every curve, one line on the console. `step` counts from 1;
        `causes` says in words what is behind a metric, for a warning about it."""
        if not self.active:
            return
        news = self.health.check(metrics, causes)
        values = metrics | self.health.derived
        row = {"step": step, **{k: v for k, v in values.items() if k in GLOSSARY or k.startswith("reward/")}}
        bounds = {bound for _, *both in PAGE.values() for bound in both if bound}
        limits = {f"healthy/{bound}": getattr(self.cfg.health, bound) for bound in sorted(bounds)}
        self._told(self.metrics_file.append((json.dumps(row) + "\n").encode()))
        self._told(self.board.scalars({name: x for name, x in (row | limits).items() if name != "step"}, step))
        for level, text in news:
            say(f"{level}, step {step}: {text}.")
        self._line(step, row, total_steps)

    def _line(self, step: int, row: dict[str, float], total_steps: int) -> None:
        now = time.monotonic()
        if now - self.last_line < 2.0 and step not in (1, total_steps):
            return
        self.last_line = now
        seen = defaultdict(lambda: math.nan, row)  # a step may have no pairs, or no rewards
        say(
            f"step {step}/{total_steps}  round {row['round'] + 1:.0f}  reward {seen['reward_mean']:.3f}  "
            f"best {seen['reward_max']:.3f}  pairs {row['pairs/per_group']:.1f}  "
            f"accuracy {seen['preference_accuracy']:.2f}  kl {row['kl_divergence']:.4f}  "
            f"length {row['response/length_mean']:.1f}  {row['tokens_per_second']:.0f} tok/s  "
            f"{row['time/step']:.2f} s"
        )

    def samples(self, step: int, parts: list[dict[int, dict[str, Any]]]) -> None:
        """All ranks' `sample_rows`, by place: samples.jsonl, and the first two as tensorboard text."""
        if not self.active:
            return
        rows = dict(sorted(item for part in parts for item in part.items()))
        lines = [json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows.values()]
        self._told(self.samples_file.append("".join(lines).encode()))
        for place, row in rows.items():
            if place < 2 and (step == 1 or step % 10 == 0):
                self._told(self.board.text(f"samples/{place}", _table(row), step))

    def _told(self, error: OSError | None) -> None:
        """Say once that the disk takes nothing, and once that it does again."""
        if error and not self.full:
            say(
                f"warning: {self.folder}: curves and samples cannot be written ({error.strerror}); they wait in "
                "memory, and training goes on."
            )
        waiting = any(file.waiting for file in (self.metrics_file, self.samples_file, self.board.file))
        if self.full and not waiting:
            say(f"{self.folder}: curves and samples are written again, none is missing.")
        self.full = waiting

    def close(self) -> None:
        """Write what still waits, or say that it is lost."""
        if not self.active:
            return
        for file in (self.metrics_file, self.samples_file, self.board.file):
            self._told(file.append(b""))
        if self.full:
            say(f"warning: {self.folder}: the last curves and samples found no room, and are lost.")


def sample_rows(exp: Experience, count: int) -> dict[int, dict[str, Any]]:
    """{place: prompt, responses, rewards, who was chosen over whom} of this rank's groups among the first `count`."""
    rows = {}
    for g, place in enumerate(exp.places):
        if place >= count:
            continue
        prompt, sampled = exp.rollout.prompts[g], exp.rollout.sampled[g]
        texts = [text for text, kept in zip(exp.rollout.texts[g], sampled.tolist(), strict=True) if kept]
        beats, rewards = exp.groups.beats[g][sampled][:, sampled], exp.groups.rewards[g][sampled]
        pairs = chosen_rejected(beats, rewards)
        rows[place] = {
            "prompt": prompt.text,
            "ground_truth": prompt.ground_truth,
            "responses": texts,
            "rewards": [round(r, 6) for r in rewards.tolist()],
            "chosen": texts[pairs[0][0]] if pairs else None,
            "rejected": texts[pairs[0][1]] if pairs else None,
        }
    return rows


def _tags(name: str, low: str | None, high: str | None) -> list[str]:
    return [f"^{name}$", *(f"^healthy/{bound}$" for bound in (low, high) if bound)]


def _table(row: dict[str, Any]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", "<br>")

    lines = [
        f"**{cell(row['prompt'])}** (answer {cell(row['ground_truth'])})",
        "",
        "| reward | response | |",
        "|---|---|---|",
    ]
    for text, reward in sorted(zip(row["responses"], row["rewards"], strict=True), key=lambda x: -x[1]):
        mark = "chosen" if text == row["chosen"] else "rejected" if text == row["rejected"] else ""
        lines.append(f"| {reward:g} | {cell(text)} | {mark} |")
    return "\n".join(lines)


def _cut_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a half-written last line: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # texts may hold other line ends
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    write_text(path, "".join(line + "\n" for line in kept))


def _rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    print("| metric | meaning |\n|---|---|")
    for name, meaning in GLOSSARY.items():
        print(f"| `{name}` | {meaning} |")

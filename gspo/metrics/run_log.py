"""Report a run while it trains: to every tracker, as a line on the console, and by the warnings of health.py.

Nothing here stops a run: what a full disk does not take is written when there is room again.

`GLOSSARY` is the one list of metrics and their meaning; docs/metrics.md is printed from it
(`python -m gspo.metrics.run_log`). `TRACKERS` is the one list of places that trainer.trackers may name.
"""

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gspo.config import Config
from gspo.errors import UserError
from gspo.metrics.health import HealthCheck
from gspo.metrics.progress import Progress
from gspo.metrics.stop_when import StopWhen
from gspo.metrics.tracker_packages import PACKAGES
from gspo.metrics.tracker_process import TrackerProcess
from gspo.metrics.trackers import MetricsFile, Samples, SamplesFile, Tracker, read_rows
from gspo.system.console import say
from gspo.system.program import guarded
from gspo.system.torchrun import is_main


def tensorboard(folder: Path, cfg: Config, start_step: int) -> Tracker:
    """Open tensorboard's tracker; its package is imported only here."""
    from gspo.metrics.tensorboard_file import TensorboardFile

    return TensorboardFile(folder, cfg, start_step)


TRACKERS: dict[str, Callable[[Path, Config, int], Tracker]] = {
    "tensorboard": tensorboard,
    **{package: partial(TrackerProcess, package) for package in PACKAGES},
}
ALWAYS = ("console", "file")  # verl's names for what every run does: its lines, metrics.jsonl and samples.jsonl
GLOSSARY = {
    "reward_mean": "mean reward over all training prompts: the batch's, for those put off their last (should rise)",
    "reward_max": "the same of the best response's reward (should rise)",
    "preference_accuracy": "share of pairs that implicit rewards order rightly (healthy > 0.6); anchored: 0.5 at first",
    "kl_divergence": "KL to the reference, nats per token, k3 estimate (healthy 0.001 to 0.1); 0 when a round begins",
    "ranking_loss": "ranking term per winner / log(1 + responses beaten): with an anchor 1 at first (should fall)",
    "reward/batch_mean": "mean reward of the step's responses: only of prompts that are not put off",
    "reward/batch_max": "mean over the step's prompts of the best response's reward",
    "reward/acc": "share of responses that the function calls right, the default by the final answer alone",
    "reward/function": "with a reward model: the mean score of the function, without the model's",
    "reward/model": "with a reward model (reward.model_path): its mean score, unweighted",
    "reward/correct": "of the default reward: share of right final answers (a list may be half right)",
    "reward/reasoning": "of the default reward: share of the stated calculations that hold",
    "reward/format": "of the default reward: share of responses whose answer is clearly marked",
    "reward/errors": "calls of the reward function that raised, returned no score or took their process with them",
    "reward/timeouts": "calls of the reward function that were ended for taking longer than reward.timeout_s",
    "reward/faults": "share of calls that failed in either way",
    "data/put_off": "share of the training prompts that this epoch skips, their last responses being rewarded alike",
    "data/epoch": "epoch, from 0: passes over the training prompts without those put off",
    "loss/total": "the loss that is minimised",
    "loss/preference": "its preference term",
    "loss/ranking": "its ranking term, weighted",
    "loss/kl": "its KL term, weighted",
    "loss/nll": "its winners' likelihood term, weighted (off by default)",
    "pairs/per_group": "preference pairs per prompt",
    "pairs/groups_without": "share of prompts that teach nothing: rewarded alike, or within the margin if it counts",
    "pairs/within_margin": "of two differently rewarded responses to a prompt: how often the margin makes them no pair",
    "pairs/accuracy_train": "the same on the training batch's pairs: the better the policy, the harder they are",
    "pairs/ranking_train": "ranking_loss of the training batch's pairs: it may rise as they get harder",
    "pairs/gap_mean": "margin: mean over pairs of the implicit reward gap, chosen less rejected (should rise)",
    "pairs/gap_std": "standard deviation over pairs of the implicit reward gap: above 1, the sigmoid saturates",
    "winner_logprob": "log-prob of the responses that beat another, before the update, nats per token",
    "winner_logprob_drop": "its fall since the round began (healthy below 0.2: else likelihood displacement)",
    "response/length_mean": "tokens per response",
    "response/length_ratio": "tokens per response / mean over the first three steps (healthy below 1.5)",
    "response/length_max": "longest response, tokens",
    "response/cutoff": "share of responses cut off at max_new_tokens",
    "entropy": "entropy of the policy at the sampling temperature, before top_p, top_k and min_p, nats per token",
    "entropy_ratio": "entropy / mean over the first three steps (healthy above 0.3, until the task is solved)",
    "grad_norm": "gradient norm before clipping, mean over the step's updates",
    "clip_share": "several optimizer steps a rollout: share of their tokens whose ratio the clip holds",
    "critic/explained_variance": "ppo: 1 - Var(return - value) / Var(return), before the update (should rise)",
    "critic/value_mean": "ppo: mean value, before the update",
    "critic/loss": "ppo: the critic's clipped loss, mean over the tokens of its updates",
    "critic/clip_share": "ppo: share of these tokens whose value has moved further than critic.clip",
    "critic/grad_norm": "ppo: norm of the critic's gradient before clipping, mean over its updates",
    "skipped_updates": "updates skipped because the gradient was not finite",
    "empty_updates": "updates skipped because no response was better than another: nothing to learn but the KL term",
    "learning_rate": "AdamW step size",
    "round": "self-play round, from 0",
    "win_rate": "once a round: how often responses beat those of the round before on held-out prompts; ties count half",
    "win_rate/ties": "share of ties in it",
    "kl_to_initial": "once a round: KL to the initial model on held-out prompts, nats per token",
    "heldout/reward_mean": "once a round: mean reward on held-out prompts",
    "heldout/accuracy": "with it: share of right responses: by the function's `acc`, or with reward.correct_at or more",
    "heldout/gap_mean": "margin of the held-out pairs of preference_accuracy (should rise)",
    "heldout/pairs": "pairs in preference_accuracy and ranking_loss; left out where those are the training batch's",
    "heldout/diverging": "once a round: rounds in a row in which training reward rose and held-out accuracy fell",
    "mismatch": "mean |sampler - trainer| log-prob of the same token",
    "balance": "tokens trained on by the fullest rank / mean over ranks: 1.0 where no rank waits for another",
    "tokens_per_second": "sampled tokens a second, over the whole step",
    "tokens_per_second/rollout": "... over the seconds of sampling alone",
    "tokens_sampled": "sampled tokens since the start; what a branch copies from its trunk is not counted",
    "tokens_prefilled": "tokens this step's sampling computed as prompts: prompts, and beginnings of trunks not kept",
    "branches/copied": "tokens that a branch has from its trunk (rollout.trunks)",
    "branches/without_place": "share of branches that copy all of their trunk, as it ended before their place",
    "time/rollout": "seconds sampling",
    "time/reward": "seconds scoring",
    "time/reference": "seconds for the reference's log-probs",
    "time/update": "seconds for forward, backward and optimizer",
    "time/step": "seconds for the whole step",
    "memory/peak_gib": "peak memory: of the GPU, or of the process on CPU",
}
SEED_FIVE = ("reward_mean", "reward_max", "preference_accuracy", "kl_divergence", "ranking_loss")


def check_trackers(names: list[str]) -> None:
    """Raise UserError, which names the nearest known one, where a tracker is unknown."""
    for name in names:
        if name not in TRACKERS and name not in ALWAYS:
            near = difflib.get_close_matches(name, TRACKERS, n=1, cutoff=0.0)[0]
            raise UserError(
                f"trainer.trackers = {name!r} is unknown; did you mean {near!r}? There are {', '.join(TRACKERS)}; "
                "metrics.jsonl and samples.jsonl are always written."
            )


class RunLog:
    """Write and print what a run shows. On ranks other than 0 it does nothing."""

    def __init__(self, folder: Path, cfg: Config, start_step: int, precision: str = "fp32", full_reward: float = 1.0):
        """precision: fp32 or bf16; full_reward: of a right response."""
        self.folder, self.health = folder, HealthCheck(cfg.health, precision, full_reward)
        self.trackers: list[Tracker] = []
        self.progress, self.disk_full = Progress(start_step), False
        self.stop_when = StopWhen(cfg.trainer.stop_when, GLOSSARY)
        if not is_main():
            return
        named = [TRACKERS[name] for name in dict.fromkeys(cfg.trainer.trackers) if name not in ALWAYS]
        self.trackers = [make(folder, cfg, start_step) for make in (MetricsFile, SamplesFile, *named)]
        for row in read_rows(folder / "metrics.jsonl"):  # a resumed run knows what it has seen and warned of
            self.health.check(row)
            self.stop_when.observe(row)
            self.progress.seen(row)

    def log(
        self,
        step: int,
        metrics: dict[str, float],
        total_steps: int,
        causes: dict[str, str] | None = None,
        best: bool = False,
    ) -> None:
        """Write the metrics of a step, counted from 1, and print its line, its warnings and what held-out prompts say.

        Metrics are left out unless they are in the glossary, the reward function's or terms of the loss. `causes` says
        in words what is behind a metric, for a warning about it; `best`: held-out prompts have never said better.
        """
        if not self.trackers:
            return
        news = self.health.check(metrics, causes)
        values = metrics | self.health.derived
        self.stop_when.observe(values)
        values = {name: x for name, x in values.items() if name in GLOSSARY or name.startswith(("reward/", "loss/"))}
        for tracker in self.trackers:
            self._warn_once(tracker.metrics(step, values))
        for level, text in news:
            say(f"{level}, step {step}: {text}.")
        self.progress.step(step, values, total_steps)
        self.progress.looked(step, values, best)

    def before_training(self, metrics: dict[str, float]) -> None:
        """Print what the held-out prompts say before the first step."""
        if self.trackers:
            self.progress.looked(0, metrics, best=False)

    def samples(self, step: int, parts: list[Samples]) -> None:
        """Write all ranks' `sample_rows`, by place."""
        rows = dict(sorted(item for part in parts for item in part.items()))
        for tracker in self.trackers:
            self._warn_once(tracker.samples(step, rows))

    def close(self) -> None:
        """Write what still waits, or say that it is lost."""
        for tracker in self.trackers:
            self._warn_once(tracker.close())
        self.progress.close()
        if self.disk_full:
            say(f"warning: {self.folder}: the last curves and samples found no room, and are lost.")

    def _warn_once(self, error: OSError | None) -> None:
        """Say once that the disk takes nothing, and once that it does again."""
        if error and not self.disk_full:
            say(
                f"warning: {self.folder}: curves and samples cannot be written ({error.strerror}); they wait in "
                "memory, and training goes on."
            )
        waiting = any(tracker.waiting for tracker in self.trackers)
        if self.disk_full and not waiting:
            say(f"{self.folder}: curves and samples are written again, none is missing.")
        self.disk_full = waiting


if __name__ == "__main__":
    rows = (f"| `{name}` | {text} |" for name, text in GLOSSARY.items())
    guarded(lambda: print("\n".join(["| metric | meaning |", "|---|---|", *rows])))

"""List the tasks, methods and ablations that learning.py trains, each as settings of train.py."""

from dataclasses import dataclass
from pathlib import Path

GRID = (5e-5, 1e-4, 2e-4, 4e-4)
GRID_SEED = 100  # not used by any final run
EVERY = 8  # steps between evaluations on the dev split
POOL = 512  # training prompts: three epochs of 16 steps

TASKS = {
    "equations": [
        f"data.train_files=[data/equations/train_{POOL}.json]",
        "data.val_files=[data/equations/dev.json]",
        "data.test_files=[data/equations/test.json]",
        "rollout.max_new_tokens=32",
    ],
    "systems": [
        "model.path=gspo/embedded/systems_model",
        "reward.path=benchmarks/systems_reward.py",
        f"data.train_files=[data/systems/train_{POOL}.json]",
        "data.val_files=[data/systems/dev.json]",
        "data.test_files=[data/systems/test.json]",
        "rollout.max_new_tokens=64",
    ],
}
COMMON = [
    *("rollout.n=4", "data.train_batch_size=32", "selfplay.rounds=2", "trainer.max_steps=48"),
    *("optim.schedule=cosine", "optim.min_lr_ratio=0.1", "optim.warmup_steps=5"),
    *("optim.epochs_per_rollout=2", "optim.minibatches=2"),
    *("eval.n=8", "eval.prompts=256", "eval.round_prompts=128", f"eval.freq={EVERY}"),
    *("trainer.save_freq=0", "trainer.keep_last=1", "trainer.sample_rows=0", "reward.workers=1", "reward.check_rows=0"),
]
FAST = ["trainer.max_steps=12", "optim.warmup_steps=2", "eval.prompts=96", "eval.round_prompts=64", "eval.freq=4"]
METHODS = {
    "GSPO": [],
    "GSPO, literal formula": ["objective.anchor=none", "objective.after_fork=1"],
    "RLOO": ["objective.algorithm=rloo"],
    "GRPO": ["objective.algorithm=grpo"],
    "Dr. GRPO": ["objective.algorithm=dr_grpo"],
    "online DPO": ["objective.algorithm=online_dpo"],
    "SPIN": ["objective.algorithm=spin"],
}
OURS = ("GSPO", "GSPO, literal formula")
ABLATIONS = {  # one setting changed at a time, at GSPO's own best learning rate
    "default": [],
    **{f"after_fork {w}": [f"objective.after_fork={w}"] for w in (0, 0.1, 1)},
    **{f"anchor {a}": [f"objective.anchor={a}"] for a in ("none", "initial", "old")},
    "no ranking loss": ["objective.use_ranking_loss=false"],
    **{f"Z {z}": [f"objective.normalizer={z}"] for z in ("batch", "group", "sqrt")},
    "pair weight gap": ["objective.pair_weight=gap"],
    **{f"margin {m}": [f"objective.margin={m}"] for m in (0, 0.05, 0.2)},
    # The same number of sampled responses a step.
    **{f"N {n}": [f"rollout.n={n}", f"data.train_batch_size={128 // n}"] for n in (2, 8, 12)},
    **{f"rounds {r}": [f"selfplay.rounds={r}"] for r in (1, 3, 5)},
    "one step a rollout": ["optim.epochs_per_rollout=1", "optim.minibatches=1"],
    "prompts not spaced": ["data.spaced=false"],
    "RLOO": ["objective.algorithm=rloo"],  # and whether the same helps a baseline
    "RLOO, prompts not spaced": ["objective.algorithm=rloo", "data.spaced=false"],
}


@dataclass(frozen=True)
class Job:
    """One training run."""

    task: str
    method: str
    lr: float
    seed: int
    settings: tuple[str, ...]

    def folder(self, out: Path) -> Path:
        name = f"{self.method}-{self.lr:g}-{self.seed}".replace(" ", "_").replace(",", "").replace(".", "_")
        return out / "runs" / self.task / name

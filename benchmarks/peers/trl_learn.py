"""Train with TRL's GRPOTrainer by one of our configurations: its rows, model, reward, schedule and numbers of samples.

    python benchmarks/peers/trl_learn.py --out OUT --config FILE [--every K] [--beta B] [section.key=value ...]

Writes OUT/steps.jsonl, a line a rollout with its seconds and tokens, and after every K rollouts the model, as the
folder OUT/step_<rollouts>. What has no equal in our configuration is TRL's default, but for gradient checkpointing,
which is off.
"""

import argparse
import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from gspo.algorithm.update import learning_rate
from gspo.config import Config
from gspo.data.prompts import load_splits
from gspo.embedded import MODEL_DIR
from gspo.models.loading import load_model_config, load_tokenizer
from gspo.read_config import load_config
from gspo.reward import reward_func


def reward_function(path: str | None) -> Callable[..., Any]:
    """Return compute_score of a file, or the default one."""
    if path is None:
        return reward_func.compute_score
    return runpy.run_path(path)["compute_score"]


class Rollouts(TrainerCallback):
    """Score responses, write a line a rollout with its seconds, and save the model after every `every` rollouts."""

    def __init__(self, folder: Path, score: Callable[..., Any], per_rollout: int, every: int, tokenizer: Any):
        self.score, self.folder, self.per_rollout, self.every, self.tokenizer = (
            score,
            folder,
            per_rollout,
            every,
            tokenizer,
        )
        self.file = (folder / "steps.jsonl").open("w", encoding="utf-8")
        self.began, self.seconds, self.tokens = 0.0, 0.0, 0

    def reward(
        self,
        completions: list[str],
        completion_ids: list[list[int]],
        ground_truth: list[str],
        data_source: list[str],
        **_: Any,
    ) -> list[float]:
        """Return the scores of the reward function, and count the tokens that were sampled."""
        self.tokens += sum(map(len, completion_ids))
        found = [self.score(s, c, t) for s, c, t in zip(data_source, completions, ground_truth, strict=True)]
        return [f["score"] if isinstance(f, dict) else f for f in found]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.seconds += time.perf_counter() - self.began
        if state.global_step % self.per_rollout:
            return
        done = state.global_step // self.per_rollout
        self.file.write(json.dumps({"step": done, "seconds": self.seconds, "tokens": self.tokens}) + "\n")
        self.file.flush()
        print(f"rollout {done}: {self.seconds:.1f} s", flush=True)
        self.seconds, self.tokens = 0.0, 0
        if done % self.every == 0:
            model.save_pretrained(self.folder / f"step_{done}")
            self.tokenizer.save_pretrained(self.folder / f"step_{done}")


def training_rows(cfg: Config, name: str) -> Dataset:
    """Return the training prompts as texts, chat template applied, which TRL turns into exactly our tokens."""
    tokenizer = load_tokenizer(name)
    prompts = load_splits(cfg, tokenizer, load_model_config(name)).train
    rows = [
        {"prompt": tokenizer.decode(p.ids), "ground_truth": p.ground_truth, "data_source": p.data_source}
        for p in prompts
    ]
    assert [tuple(tokenizer(row["prompt"])["input_ids"]) for row in rows] == [p.ids for p in prompts]
    return Dataset.from_list(rows)


def trl_config(cfg: Config, out: Path, beta: float, loss: str, updates: int) -> GRPOConfig:
    """Return TRL's settings for ours: as many responses a rollout, and as many optimizer steps."""
    at_once = cfg.data.train_batch_size * cfg.rollout.n // cfg.optim.minibatches
    return GRPOConfig(
        output_dir=str(out / "trl"),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=1,
        steps_per_generation=cfg.optim.minibatches,
        num_iterations=cfg.optim.epochs_per_rollout,
        num_generations=cfg.rollout.n,
        max_completion_length=cfg.rollout.max_new_tokens,
        temperature=cfg.rollout.temperature,
        max_steps=updates,
        learning_rate=cfg.optim.learning_rate,
        max_grad_norm=cfg.optim.grad_clip,
        beta=beta,
        loss_type=loss,
        epsilon=cfg.objective.clip_low,
        epsilon_high=cfg.objective.clip_high,
        seed=cfg.trainer.seed,
        bf16=cfg.model.precision == "bf16",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def train(cfg: Config, out: Path, every: int, beta: float, loss: str) -> None:
    """Train, with our optimizer and our schedule of the step size."""
    name, o = cfg.model.path or str(MODEL_DIR), cfg.optim
    per_rollout, rollouts = o.minibatches * o.epochs_per_rollout, cfg.trainer.max_steps
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    optimizer = torch.optim.AdamW(
        model.parameters(), o.learning_rate, (o.beta1, o.beta2), weight_decay=o.weight_decay, foreach=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: learning_rate(min(k // per_rollout, rollouts - 1), rollouts, cfg) / o.learning_rate
    )
    rollouts_seen = Rollouts(out, reward_function(cfg.reward.path), per_rollout, every, tokenizer)
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=rollouts_seen.reward,
        args=trl_config(cfg, out, beta, loss, rollouts * per_rollout),
        train_dataset=training_rows(cfg, name),
        callbacks=[rollouts_seen],
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    assert trainer.state.global_step == rollouts * per_rollout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the models and steps.jsonl")
    parser.add_argument("--config", required=True)
    parser.add_argument("--every", type=int, default=1, help="rollouts between two models that are kept")
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the KL term, TRL's default")
    parser.add_argument("--loss", default="dapo", help="loss_type, TRL's default")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(load_config(args.config, args.overrides), args.out, args.every, args.beta, args.loss)


if __name__ == "__main__":
    main()

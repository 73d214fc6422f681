"""Train with TRL's GRPOTrainer on the workload of benchmarks/step.py; print `step k` after each step, then lengths.

    python benchmarks/peers/trl_step.py MODEL ROWS.json --prompts 4 --n 8 --new 64 --steps 3 --rows_at_once 32 [--bf16]

One step a batch, a reference model for the KL term, no gradient checkpointing; TRL's defaults otherwise.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def reward(completions: list, **_) -> list[float]:
    """Return the score of benchmarks/step_reward.py."""
    return [len(set(c[0]["content"])) / 100 for c in completions]


class Steps(TrainerCallback):
    """Print a line after each step, and keep the mean lengths."""

    def __init__(self) -> None:
        self.lengths: list[float] = []

    def on_step_end(self, args, state, control, **_) -> None:
        print(f"step {state.global_step}", flush=True)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if logs and "completions/mean_length" in logs:
            self.lengths.append(float(logs["completions/mean_length"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    for name in ("prompts", "n", "new", "steps", "rows_at_once"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--bf16", action="store_true")
    a = parser.parse_args()
    texts = [row["prompt"] for row in json.loads(a.rows.read_text(encoding="utf-8"))]
    prompts = [[{"role": "user", "content": text}] for text in texts]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=a.rows_at_once,
        gradient_accumulation_steps=a.prompts * a.n // a.rows_at_once,
        num_generations=a.n,
        max_completion_length=a.new,
        max_steps=a.steps,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        temperature=0.9,
        beta=0.04,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=a.bf16,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        model_init_kwargs={"dtype": "bfloat16" if a.bf16 else "float32"},
    )
    steps = Steps()
    data = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    GRPOTrainer(model=a.model, reward_funcs=reward, args=config, train_dataset=data, callbacks=[steps]).train()
    print(json.dumps({"length": sum(steps.lengths) / max(1, len(steps.lengths))}))


if __name__ == "__main__":
    main()

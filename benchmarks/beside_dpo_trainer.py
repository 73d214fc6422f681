"""Compare the loss and the gradient of one batch of pairs with those of TRL's DPOTrainer, in float32.

    python benchmarks/beside_dpo_trainer.py   # seconds; part of `make bench`

The policy is the embedded model with noise on its weights, so that it differs from the reference. Prints, for DPO's
sigmoid and for IPO, both losses and the largest difference of a gradient as a share of that parameter's largest entry.
Ends with exit code 1 where they differ by more than rounding.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gspo  # noqa: F401 -- before torch

# isort: split
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from gspo.algorithm.objective import as_trained
from gspo.algorithm.self_play_models import SelfPlayModels
from gspo.algorithm.update import Updater, make_optimizer
from gspo.config import Config
from gspo.data.prompts import load_splits
from gspo.data.stored_rows import stored_groups
from gspo.distributed.world import World, process_group
from gspo.embedded import MODEL_DIR, equations
from gspo.models.loading import load_model_config, load_tokenizer
from gspo.read_config import load_config
from train import gather_experience

PAIRS, NOISE, TOLERANCE = 8, 0.02, 2e-4
Found = tuple[float, dict[str, torch.Tensor]]  # loss, gradient by parameter


def pairs(folder: Path) -> Path:
    """Write rows with the right answer as chosen and a longer, wrong one as rejected."""
    equations.write_splits(folder)
    rows = json.loads((folder / "train.json").read_text(encoding="utf-8"))[:PAIRS]
    lines = [
        {"prompt": r["prompt"], "chosen": f"Answer: {r['ground_truth']}", "rejected": f"x = {i} + {i}\nAnswer: {i}"}
        for i, r in enumerate(rows)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder / "pairs.jsonl"


@torch.no_grad()
def add_noise(model: nn.Module) -> None:
    """Move every parameter by noise in proportion to its size, the same for both."""
    generator = torch.Generator().manual_seed(1)
    for _, p in sorted(model.named_parameters()):
        p.add_(torch.randn(p.shape, generator=generator) * p.std() * NOISE)


def ours(cfg: Config, world: World) -> Found:
    """Return our loss and gradient of all pairs."""
    tokenizer = load_tokenizer(None)
    rows = load_splits(cfg, tokenizer, load_model_config(None), stored=True).train[:]
    models = SelfPlayModels(as_trained(cfg), world)
    add_noise(models.policy)
    optimizer, gradient = make_optimizer(models.policy, cfg), {}
    optimizer.step = lambda: gradient.update({n: p.grad.clone() for n, p in models.policy.named_parameters()})
    _, rollout, scores = stored_groups(
        rows, world.places(len(rows)), tokenizer, tokenizer.eos_token_id, torch.device("cpu")
    )
    experience = gather_experience(rollout, world.places(len(rows)), scores, models, len(rows), cfg, world)
    updater = Updater(models.policy, models.head, optimizer, as_trained(cfg), world, models.autocast)
    return updater.run(experience, lr=0.0).terms["preference"], gradient


def theirs(cfg: Config, folder: Path) -> Found:
    """Return TRL's loss and gradient of all pairs."""
    tokenizer = load_tokenizer(None)
    rows = load_splits(cfg, tokenizer, load_model_config(None), stored=True).train[:]
    lines = [
        {"prompt": tokenizer.decode(row.ids), "chosen": row.stored.texts[0], "rejected": row.stored.texts[1]}
        for row in rows
    ]
    policy, reference = (AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32) for _ in range(2))
    add_noise(policy)
    settings: dict[str, Any] = {
        **{"output_dir": str(folder), "per_device_train_batch_size": PAIRS, "beta": cfg.objective.preference_beta},
        **{"loss_type": [cfg.objective.dpo_loss], "report_to": []},
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True},
    }
    trainer = DPOTrainer(
        policy, reference, DPOConfig(**settings), train_dataset=Dataset.from_list(lines), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in trainer.model.named_parameters()}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder, process_group() as world:
        file = pairs(Path(folder))
        for kind, norm in (("sigmoid", "sum"), ("ipo", "mean")):  # TRL's IPO is of mean log-probs
            settings = [f"data.train_files=[{file}]", "data.val_files=[]", "data.shuffle=false", "optim.grad_clip=1e9"]
            settings += [
                f"data.train_batch_size={PAIRS}",
                f"objective.dpo_loss={kind}",
                f"objective.length_norm={norm}",
            ]
            cfg = load_config("dpo", settings)
            (loss, gradient), (other, other_gradient) = ours(cfg, world), theirs(cfg, Path(folder))
            apart = max(float((gradient[name] - g).abs().max() / g.abs().max()) for name, g in other_gradient.items())
            print(f"{kind}: loss {loss:.6f}, TRL's {other:.6f}; gradients differ by {apart:.1e} of the largest entry")
            worst = max(worst, apart, abs(loss - other) / other)
    sys.exit(int(worst > TOLERANCE))


if __name__ == "__main__":
    main()

"""Write the full gradient of one step, computed on any number of ranks. Started by test_world.py.

torchrun --nproc_per_node=K tests/programs/one_gradient.py OUT.safetensors [section.key=value ...]
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from gspo.algorithm.critic import CriticUpdater
from gspo.algorithm.objective import as_trained, find_algorithm, learns_from_rows
from gspo.algorithm.self_play_models import SelfPlayModels
from gspo.algorithm.update import Updater, make_optimizer
from gspo.data.batches import Batches
from gspo.data.prompts import load_splits
from gspo.data.stored_rows import stored_groups
from gspo.distributed.adapters import Adapter
from gspo.distributed.move_weights import full_tensor, local_shard, local_slices
from gspo.distributed.world import process_group
from gspo.models.loading import load_model_config, load_tokenizer
from gspo.packing.balance import balance
from gspo.read_config import load_config
from gspo.reward.scorer import Scorer
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import Sampler
from gspo.rollout.tree import Tree
from gspo.system.program import end_process
from train import gather_experience


@torch.no_grad()
def move_adapter(adapter: Adapter) -> None:
    """Give an adapter values of a policy that has been trained: at the start A has no gradient."""
    g = torch.Generator().manual_seed(0)
    for p in adapter.parameters():
        local_shard(p).copy_((0.02 * torch.randn(p.shape, generator=g))[local_slices(p)])


def main() -> None:
    out, cfg = Path(sys.argv[1]), load_config("configs/quick.yaml", sys.argv[2:])
    with process_group() as world:
        tokenizer = load_tokenizer(None)
        stored = learns_from_rows(cfg)
        splits = world.main_process_first(lambda: load_splits(cfg, tokenizer, load_model_config(None), stored=stored))
        batch = Batches(splits.train, cfg.data.train_batch_size, cfg.trainer.seed).take()
        trained = as_trained(cfg)
        models = SelfPlayModels(trained, world)
        if models.lora is not None:
            move_adapter(models.trained)
            models.refresh_sampler()
        optimizer = make_optimizer(models.policy, cfg)
        tp = cfg.rollout.tensor_model_parallel_size
        sampler = Sampler(models.sampler, tokenizer, world.device, seed=cfg.trainer.seed, tp=tp, agree=models.agree)
        tree = Tree.of(cfg.rollout)
        if stored:
            places = world.places(len(batch))
            places, rollout, scores = stored_groups(batch, places, tokenizer, sampler.end_id, world.device)
        else:
            places, rollout = sampler.generate_share(batch, cfg.rollout.n, Sampling.of(cfg.rollout), world, tree=tree)
            scores = Scorer(cfg.reward)(rollout)
        places, rollout, scores, _ = balance(places, rollout, scores, cfg.optim.minibatches, world)
        experience = gather_experience(rollout, places, scores, models, len(batch), cfg, world, tree)
        gradient = {}

        def keep_gradient(model: torch.nn.Module, prefix: str = "") -> None:
            for name, p in model.named_parameters():
                if not p.requires_grad:  # the base of adapters
                    continue
                gradient[prefix + name] = full_tensor(p.grad).cpu().clone().contiguous()

        optimizer.step = lambda: keep_gradient(models.policy)
        if find_algorithm(cfg.objective.algorithm).needs_critic:
            critic = CriticUpdater(models.new_critic(), models.policy, cfg, world, models.autocast)
            torch.nn.init.constant_(critic.critic.value.weight, 0.05)  # at 0 its body has no gradient
            experience = critic.judge(experience)
            torch.nn.init.constant_(critic.critic.value.bias, 0.1)
            critic.optimizer.step = lambda: keep_gradient(critic.critic, "critic.")
            critic.run(experience, 0)
        Updater(models.policy, models.head, optimizer, trained, world, models.autocast).run(experience, lr=0.0)
        answers = zip(rollout.tokens.tolist(), rollout.lengths.tolist(), strict=True)
        tokens = [[ids[:n] for ids, n in zip(*group, strict=True)] for group in answers]
        texts = world.gather(list(zip(places, rollout.texts, experience.groups.rewards.tolist(), tokens, strict=True)))
        if world.is_main:
            save_file(gradient, out)
            rows = sorted(row for part in texts for row in part)
            out.with_suffix(".json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
    end_process()

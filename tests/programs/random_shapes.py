"""Compare loss and gradient of random batches on several ranks with one process. Started by test_world.py.

torchrun --nproc_per_node=K tests/programs/random_shapes.py OUT.json COUNT

Ragged prompts and answers, batches with fewer groups than ranks, groups without pairs, every way to cut and to sum.
Rank 0 repeats each batch alone, on a whole model, and writes by how much the two differ.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from gspo.algorithm.self_play_models import SelfPlayModels
from gspo.algorithm.update import Updater, make_optimizer
from gspo.distributed.move_weights import full_tensor
from gspo.distributed.world import process_group
from gspo.packing.balance import balance
from gspo.read_config import load_config
from gspo.system.program import end_process
from gspo.types import Prompt, Rollout, Scores
from train import gather_experience

FIXED = ("rollout.temperature=0.9", "optim.grad_clip=1e9", "objective.kl_coef=0.05", "objective.nll_coef=0.1")


class Keeping(Updater):
    """Keeps the gradient of every optimizer step, whole."""

    def _step(self, *args):
        self.kept.append({name: full_tensor(p.grad).cpu().clone() for name, p in self.policy.named_parameters()})
        super()._step(*args)


def batch(seed):
    """A scored rollout of 1 to 7 prompts, 2 to 5 answers each, as random as its seed."""
    g = torch.Generator().manual_seed(seed)
    some = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))  # noqa: E731
    groups, n = some(1, 7), some(2, 5)
    prompts = [Prompt(k, tuple(some(4, 60) for _ in range(some(1, 20))), "", "", "") for k in range(groups)]
    lengths = torch.randint(1, some(2, 24), (groups, n), generator=g)
    real = torch.arange(int(lengths.max())) < lengths[..., None]
    tokens = torch.randint(4, 60, real.shape, generator=g) * real
    sampled = -torch.rand(real.shape, generator=g) * real
    rollout = Rollout(prompts, tokens, lengths, sampled, -sampled, lengths < 9, [[""] * n for _ in prompts])
    rewards = torch.tensor([0.0, 0.1, 0.5, 1.0])[torch.randint(0, 4, (groups, n), generator=g)]
    if seed % 10 == 9:
        rewards[:] = 0.5  # not a pair in the whole batch
    rewards[torch.rand(groups, generator=g) < 0.3] = 0.1  # nor in some groups of others
    return rollout, Scores(rewards)


def settings(seed, size):
    g = torch.Generator().manual_seed(1000 + seed)
    one_of = lambda *values: values[int(torch.randint(0, len(values), (1,), generator=g))]  # noqa: E731
    return [
        f"optim.micro_batch_tokens={one_of(20, 60, 200, 4000)}",
        f"optim.minibatches={one_of(1, 1, 2, 3)}",
        f"optim.epochs_per_rollout={one_of(1, 1, 2)}",
        f"optim.gradient_reduction={one_of('micro_batch', 'step')}",
        f"objective.normalizer={one_of('constant', 'batch', 'group')}",
        f"model.reshard_after_forward={one_of('true', 'false')}",
        f"optim.offload={one_of('false', 'false', 'true')}",
        f"model.shard_size={one_of(*[s for s in range(1, size + 1) if size % s == 0])}",
        f"model.gradient_checkpointing={one_of('false', 'true')}",
    ]


def step(models, cfg, seed):
    """One update of this rank's share -> (gradients of its optimizer steps, loss terms), summed over ranks."""
    world, (rollout, scores) = models.world, batch(seed)
    places, groups = world.places(len(rollout.prompts)), len(rollout.prompts)
    share = rollout.select(places), Scores(scores.rewards[places], predictions=[[None]] * len(places))
    places, mine, scored, _ = balance(places, *share, cfg.optim.minibatches, world)
    experience = gather_experience(mine, places, scored, models, groups, cfg, world)
    updater = Keeping(models.policy, models.head, make_optimizer(models.policy, cfg), cfg, world, models.autocast)
    updater.kept = []
    update = updater.run(experience, lr=0.0)
    terms = world.gather(update.terms)  # a rank without groups has none
    return updater.kept, {
        name: sum(part.get(name, 0.0) for part in terms) for name in sorted({k for part in terms for k in part})
    }


def opened(cfg, world, opened_before={}):  # noqa: B006
    """SelfPlayModels whose policy is not their reference; those with the same shards are the same."""
    key = world.size, cfg.model.shard_size, cfg.optim.offload, cfg.model.gradient_checkpointing
    if key not in opened_before:
        opened_before[key] = SelfPlayModels(cfg, world)
        with torch.no_grad():
            for p in opened_before[key].policy.parameters():
                p.mul_(1.1)
    opened_before[key].cfg = cfg
    return opened_before[key]


def difference(ours, theirs):
    """How far two gradients' entries are apart at most, as a share of the largest entry."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        error, size = (max(float(x.abs().max()) for x in values) for values in ([a[k] - b[k] for k in b], b.values()))
        worst = max(worst, error / size if size else error)
    return worst


def main() -> None:
    out, count, result = Path(sys.argv[1]), int(sys.argv[2]), []
    with process_group() as world:
        for seed in range(count):
            cfg = load_config(None, [*FIXED, *settings(seed, world.size)])
            ours, terms = step(opened(cfg, world), cfg, seed)
            if not world.is_main:
                continue
            alone = replace(world, size=1, mesh=None)
            theirs, expected = step(opened(load_config(None, FIXED), alone), cfg, seed)
            rollout, scores = batch(seed)
            result.append({
                "groups": len(rollout.prompts), "paired": int((scores.rewards.std(1) > 0).sum()), "steps": len(ours),
                "gradient": difference(ours, theirs), "size": max(float(x.abs().max()) for x in theirs[0].values()),
                "loss": max(abs(terms[k] - expected[k]) / max(1e-3, abs(expected[k])) for k in expected),
            })  # fmt: skip
        if world.is_main:
            out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    end_process()

"""One training run: what it works with, how it is opened and saved, and how it is evaluated on the way."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspo.algorithm.self_play import SelfPlayModels, kl_divergence_to, win_rate
from gspo.algorithm.update import Updater, make_optimizer
from gspo.checkpoint.checkpoints import Checkpoints, State, load_order, load_state, restore
from gspo.checkpoint.run_folder import open_run, save_reward_function
from gspo.config import Config
from gspo.data.batches import Batches
from gspo.data.prompts import Splits
from gspo.distributed.world import World
from gspo.memory.footprint import memory_report_line
from gspo.metrics.evaluation import answer, correct_of, report
from gspo.metrics.tracker import Tracker
from gspo.models.precision import DTYPES, choose_precision
from gspo.reward.scorer import Scorer
from gspo.rollout.sampler import EVAL, Sampler
from gspo.rollout.sampling import Sampling
from gspo.system.console import say
from gspo.system.files import write_json
from gspo.system.preemption import Preemption


@dataclass
class Run:
    """What one training run works with."""

    cfg: Config
    world: World
    splits: Splits
    batches: Batches
    scorer: Scorer
    models: SelfPlayModels
    sampler: Sampler
    sampling: Sampling
    updater: Updater
    tracker: Tracker
    state: State
    folder: Path
    checkpoints: Checkpoints
    preemption: Preemption


def start(
    cfg: Config, world: World, model_config: Any, tokenizer: Any, splits: Splits, batches: Batches, scorer: Scorer
) -> Run:
    """Open the run's folder, and the models as they stand at its latest checkpoint, if there is one."""
    folder, resume = open_run(cfg, world)
    state = load_state(resume) if resume else State()
    if world.is_main:
        save_reward_function(folder, scorer.pool.source, state.step)
    if not state.precision:
        state.precision, measured = world.broadcast_from_main(
            lambda: choose_precision(cfg.model.precision, world.device, model_config)
        )
        if measured:
            say(f"model.precision=auto: {state.precision} ({measured})")
    if world.is_main:
        longest = max(len(splits.train[k].ids) for k in range(min(len(splits.train), 256)))
        say(memory_report_line(cfg, world, state.precision, longest))
    models = SelfPlayModels(cfg, world, DTYPES[state.precision], weights_from=resume)
    optimizer = make_optimizer(models.policy, cfg)
    if resume:
        restore(resume, models.policy, optimizer, models.frozen, state)
        batches.load_state(load_order(resume))
    updater = Updater(models.policy, models.head, optimizer, cfg, world, models.autocast)
    sampler = Sampler(
        models.sampler,
        tokenizer,
        world.device,
        engine=cfg.rollout.engine,
        max_slots=cfg.rollout.max_slots,
        kv_memory_gib=cfg.rollout.kv_memory_gib,
        seed=cfg.trainer.seed,
        tp=cfg.rollout.tensor_model_parallel_size,
        agree=models.agree,
    )
    sampling, tracker = Sampling.of(cfg.rollout), Tracker(folder, cfg, state.step)
    checkpoints, preemption = Checkpoints(folder, cfg, tokenizer, world), Preemption()
    return Run(
        cfg, world, splits, batches, scorer, models, sampler, sampling, updater, tracker, state, folder, checkpoints,
        preemption,
    )  # fmt: skip


def save(run: Run, at_once: bool = False) -> None:
    """Begin a checkpoint from which everything goes on as if it had not stopped."""
    models, optimizer, order = run.models, run.updater.optimizer, run.batches.state()
    run.checkpoints.save(run.state, models.policy, optimizer, models.frozen, order, at_once)


def test(run: Run, name: str) -> None:
    """Greedy and sampled accuracy on the test prompts, kept as a file of the run."""
    run.models.refresh_sampler()
    answers = answer(run.sampler, run.scorer, run.splits.test, run.cfg.eval.n, run.sampling, run.world)
    if run.world.is_main:
        result = {"step": run.state.step, **report(answers)}
        try:
            write_json(run.folder / f"{name}.json", result)
        except OSError as e:
            say(f"warning: {name}.json cannot be written ({e.strerror}); pass@1 is {result['pass@1']:.3f}")


def held_out(run: Run, step: int, ends_round: bool) -> dict[str, float]:
    """Answers to held-out prompts; when a round ends they meet the previous self's, and take their place."""
    cfg, world, state = run.cfg, run.world, run.state
    if not run.splits.val:
        return {}
    run.models.refresh_sampler()
    places, rollout = run.sampler.generate_share(
        run.splits.val, cfg.rollout.n, run.sampling, world, purpose=EVAL, step=step, on_group=run.scorer.begin
    )
    scores = run.scorer(rollout)
    rewards = world.gather_rows(places, scores.rewards)
    correct = world.gather_rows(places, correct_of(scores).float())
    metrics = {"heldout/reward_mean": float(rewards.mean()), "heldout/accuracy": float(correct.mean())}
    if step > 0:
        metrics["kl_to_initial"] = kl_divergence_to(run.models, run.models.initial(), rollout, world)
    if ends_round and state.round_rewards is not None:
        before = torch.tensor(state.round_rewards)
        metrics["win_rate"], metrics["win_rate/ties"] = win_rate(rewards, before, cfg.objective.margin)
    if ends_round:
        state.round_rewards = rewards.tolist()
    return metrics

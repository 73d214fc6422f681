"""Group Self-Play Preference Optimization: the training loop.

    python train.py --config configs/quick.yaml [section.key=value ...]
    torchrun --nproc_per_node=8 train.py --config configs/standard.yaml [...]

A step is data -> rollout -> reward -> pairs -> log-probs -> objective -> update -> log (`take_step`). Where the rows
hold the responses (DPO), they are read instead of sampled and scored. When a self-play round ends, the opponent becomes
a copy of the policy. This file is where the stages meet.
"""

import math
import sys
from dataclasses import replace

import gspo  # noqa: F401 -- before torch
from gspo.training_arguments import check_command_line, training_arguments

if __name__ == "__main__" or sys.argv[0].endswith("gspo-train"):
    check_command_line(__doc__)  # before torch is imported, which takes seconds

# isort: split
import torch
from torch import Tensor
from torch.nn.functional import pad

from gspo.algorithm.cutoffs import learned_pairs, learned_rewards
from gspo.algorithm.gold_solutions import SOLUTION_REWARD, add_solution_rewards, add_solutions, prefer_solutions
from gspo.algorithm.objective import find_algorithm, learns_from_rows
from gspo.algorithm.pairs import branch_weights, forks, has_contrast, preferences
from gspo.algorithm.self_play_models import SelfPlayModels
from gspo.algorithm.update import learning_rate
from gspo.checkpoint.evaluations import needs_evaluation
from gspo.checkpoint.find_runs import latest_checkpoint
from gspo.checkpoint.run_folder import check_run
from gspo.config import Config
from gspo.data.batches import Batches
from gspo.data.prompts import group_size, load_splits, scorable
from gspo.data.stored_rows import stored_groups
from gspo.distributed.world import World, process_group
from gspo.errors import UserError
from gspo.launch_checks import (
    check_launch,
    describe_reward,
    final_words,
    first_prompt,
    say_fine,
    say_inputs,
    say_notes,
    say_progress,
)
from gspo.metrics.group_rows import sample_rows
from gspo.metrics.step_metrics import Clock, Meter, observe, peak_memory_gib, training_pairs, without_sampling
from gspo.models.loading import check_weights, load_model_config, load_tokenizer
from gspo.packing.balance import balance
from gspo.read_config import load_config
from gspo.reward.gold_check import require_gold
from gspo.reward.scorer import Scorer
from gspo.rollout.tree import Tree
from gspo.run import (
    Run,
    StopReason,
    asked_to_leave,
    end_round_if_over,
    evaluate_run,
    evaluation_settings,
    fingerprints_of,
    measure_at_first,
    save_checkpoint,
    say_round_begins,
    start_run,
    stop_reason,
)
from gspo.system.console import say
from gspo.system.program import guarded
from gspo.types import Collected, Experience, Groups, Prompt, Rollout, Scores, Update


def train(cfg: Config, world: World, check_only: bool = False) -> None:
    """Run, or resume, one training run: from its configuration to its final table."""
    model_config, tokenizer = load_model_config(cfg.model.path), load_tokenizer(cfg.model.path, cfg.data.chat_template)
    check_launch(cfg, model_config, world, started=not check_only)
    world.broadcast_from_main(lambda: check_weights(cfg.model.path, values=True))
    scorer = Scorer(cfg.reward, world.device)
    needs = {
        "needs_solutions": find_algorithm(cfg.objective.algorithm).needs_solutions,
        "stored": learns_from_rows(cfg),
    }
    splits = world.main_process_first(lambda: load_splits(cfg, tokenizer, model_config, **needs))
    batches = Batches(splits.train, cfg.data.train_batch_size, cfg.trainer.seed, cfg.data.shuffle, cfg.data.spaced)
    total = cfg.trainer.max_steps or cfg.trainer.total_epochs * batches.per_epoch
    checked = next((rows for rows in (splits.train, splits.val, splits.test) if scorable(rows)), [])
    if checked:  # else there is nothing to score: rewards are read from the rows
        correct_at = world.broadcast_from_main(lambda: require_gold(scorer, checked, cfg.reward.check_rows))
        scorer.of_each.correct_at = correct_at
    if check_only:
        say_inputs(cfg.model.path, splits, describe_reward(scorer), f"{world.devices()}, {cfg.model.precision}")
        say(first_prompt(splits.train, tokenizer))
        say_notes(cfg, total)
        check_run(cfg, fingerprints_of(cfg, splits, scorer, tokenizer))
        return say_fine(cfg, len(splits.train), total, group_size(cfg, splits.train))

    run = start_run(cfg, world, model_config, tokenizer, splits, batches, scorer, total)
    say(first_prompt(splits.train, tokenizer))
    say_notes(cfg, total)
    state, evaluates = run.state, scorable(splits.test) and cfg.eval.before_and_after
    if state.step:
        say_progress(run.folder, state.step, cfg, total)
    else:
        measure_at_first(run, evaluates)

    # when something fails, a checkpoint that is being written is finished
    with run.checkpoints as checkpoints, run.preemption.finishing_steps():
        stop = take_steps(run)
        if state.step:
            save_checkpoint(run, at_once=True)
            checkpoints.require(state.step)
        run.log.close()
        stop = stop or asked_to_leave(run)  # while the last step was taken
    if stop and stop.kind == "alarm":
        raise UserError(f"stopped after step {state.step}, with a checkpoint: {stop.text}")
    if stop and stop.kind == "goal":
        say(f"{stop.text}: ended after step {state.step} of {total}")
    elif stop:
        return say(f"{stop.text}: left after step {state.step} of {total}; the same command goes on from there")

    if evaluates and needs_evaluation(run.folder, "eval_after", state.step, evaluation_settings(run), world):
        evaluate_run(run, "eval_after")
    if world.is_main:
        say(final_words(run.folder, latest_checkpoint(run.folder / "checkpoints"), state))


def take_steps(run: Run) -> StopReason | None:
    """Take the steps that are left; return what ended the run earlier, if anything did."""
    run.log.progress.begin()
    while run.state.step < run.total_steps:
        stop = stop_reason(run)
        if stop:
            return stop
        take_step(run)
    return None


def take_step(run: Run) -> None:
    """Take one step: collect (data, rollout, reward) -> experience (pairs, log-probs) -> update (objective) -> log."""
    cfg, world, step, clock = run.cfg, run.world, run.state.step, Clock(run.world.device)
    prompts = run.batches.take()
    stored = learns_from_rows(cfg)
    tree = None if stored else Tree.of(cfg.rollout, run.state.response_length, run.state.response_entropy)
    collected = read_rows(run, prompts) if stored else sample_and_score(run, prompts, tree, clock)
    places, rollout, scores = collected
    outcomes = group_outcomes(scores, rollout.finished, cfg)
    curves = run.batches.record(*world.gather_rows(places, outcomes).T.tolist())
    with clock("reference"):  # pairs, and log-probs under the frozen models
        places, rollout, scores, imbalance = balance(places, rollout, scores, cfg.optim.minibatches, world)
        if find_algorithm(cfg.objective.algorithm).needs_solutions:
            rollout = add_solutions(rollout, run.sampler.tokenizer, run.sampler.end_id, run.models.policy.config, world)
        experience = gather_experience(rollout, places, scores, run.models, len(prompts), cfg, world, tree)
        experience = run.critic.judge(experience) if run.critic else experience
    with clock("update"):  # evaluates the objective
        lr = learning_rate(step, run.total_steps, cfg)
        update = run.updater.run(experience, lr)
        curves |= run.critic.run(experience, step) if run.critic else {}
    finish_step(run, experience, scores, update, clock, curves | {"learning_rate": lr, "balance": imbalance})


def sample_and_score(run: Run, prompts: list[Prompt], tree: Tree | None, clock: Clock) -> Collected:
    """Collect this rank's groups of a step from the policy: N responses to each of its prompts, and their rewards."""
    with clock("rollout"):
        run.models.refresh_sampler()
        places, rollout = run.sampler.generate_share(
            prompts,
            run.cfg.rollout.n,
            run.sampling,
            run.world,
            step=run.state.step,
            on_group=run.scorer.begin,
            tree=tree,
        )
    with clock("reward"):
        return places, rollout, run.scorer(rollout)


def read_rows(run: Run, prompts: list[Prompt]) -> Collected:
    """Collect this rank's groups of a step from the training rows, which hold responses and rewards."""
    sampler, places = run.sampler, run.world.places(len(prompts))
    return stored_groups(prompts, places, sampler.tokenizer, sampler.end_id, run.world.device)


def group_outcomes(scores: Scores, finished: Tensor, cfg: Config) -> Tensor:
    """Return [G, 3] float64: whether a group has contrast, without which nothing is learned from it; its mean and its
    best reward. NaN where the reward function failed and the group is left out.

    A gold solution belongs to its group: it leaves no contrast where all responses score like it.
    """
    algorithm, rewards, margin = find_algorithm(cfg.objective.algorithm), scores.rewards.double(), cfg.objective.margin
    compared = learned_rewards(rewards, finished.to(rewards.device), cfg.rollout.on_cutoff, margin)
    compared = pad(compared, (0, int(algorithm.needs_solutions)), value=SOLUTION_REWARD)
    contrast = has_contrast(compared, margin if algorithm.uses_margin else 0.0)
    outcomes = torch.stack([contrast, rewards.mean(1), rewards.amax(1)], 1)
    outcomes[scores.skipped] = math.nan
    return outcomes


def gather_experience(
    rollout: Rollout,
    places: list[int],
    scores: Scores,
    models: SelfPlayModels,
    batch_groups: int,
    cfg: Config,
    world: World,
    tree: Tree | None = None,
) -> Experience:
    """Rewards -> pairs, and the log-probs of the reference and the anchor, which the objective compares with."""
    how, margin, ended = cfg.rollout.on_cutoff, cfg.objective.margin, rollout.finished
    rewards = learned_rewards(scores.rewards.to(world.device), ended[:, : scores.rewards.shape[1]], how, margin)
    rewards = add_solution_rewards(rewards, rollout)
    beats = prefer_solutions(learned_pairs(preferences(rewards, margin), ended, how), rollout.sampled)
    reference, anchors = models.reference_and_anchor_logprobs(rollout)
    if learns_from_rows(cfg):
        rollout = replace(rollout, logprobs=reference)  # what sampled the rows is unknown
    branching = tree.leaf_places(rollout) if tree else None
    weights = None if branching is None else branch_weights(branching, tree.trunks, rollout.tokens.shape[2])
    groups = Groups(anchors, rewards, beats, forks(rollout.tokens, rollout.lengths), rollout.lengths, weights)
    return Experience(rollout, groups, reference, places, batch_groups, batch_pairs=int(world.sum(int(beats.sum()))))


def finish_step(
    run: Run, experience: Experience, scores: Scores, update: Update, clock: Clock, shown: dict[str, float]
) -> None:
    """Count the step, end the round where it is over, log, and begin a checkpoint where one is due."""
    cfg, world, state = run.cfg, run.world, run.state
    state.step += 1
    state.count_non_finite(update.skipped, cfg.health.max_bad_steps, update.not_finite, run.checkpoints.steps)
    metrics = Meter.merge(world.gather(observe(experience, scores, update, cfg.objective).state())) | shown
    if learns_from_rows(cfg):
        metrics = without_sampling(metrics)
    state.tokens_sampled += int(metrics.get("tokens", 0))
    state.observe_responses(metrics)
    metrics |= {"round": float(state.round), "tokens_sampled": float(state.tokens_sampled)}
    metrics |= end_round_if_over(run)
    metrics = training_pairs(metrics) | metrics
    metrics |= clock.metrics(metrics.get("tokens")) | {"memory/peak_gib": peak_memory_gib(world.device)}
    best = not state.bad_steps and state.is_best(metrics)
    run.log.log(state.step, metrics, run.total_steps, causes={"skipped_updates": update.not_finite}, best=best)
    say_round_begins(run, metrics["round"])
    samples = sample_rows(experience, scores, cfg.trainer.sample_rows, run.sampler.tokenizer)
    run.log.samples(state.step, world.gather(samples))
    run.checkpoints.commit()
    if (best and cfg.trainer.keep_best) or (cfg.trainer.save_freq and state.step % cfg.trainer.save_freq == 0):
        save_checkpoint(run)


def main() -> None:
    args = training_arguments(__doc__)
    with process_group() as world:  # around all that may fail: of several ranks one says why
        train(load_config(args.config, args.overrides, note=say), world, check_only=args.check)


def program() -> None:
    """Run `main` as the program train.py or gspo-train."""
    guarded(main, "interrupted; the same command goes on from the last checkpoint, if any (SIGTERM saves one first)")


if __name__ == "__main__":
    program()

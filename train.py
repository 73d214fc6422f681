"""Group Self-Play Preference Optimization: the training loop.

    python train.py --config configs/quick.yaml [section.key=value ...]
    torchrun --nproc_per_node=8 train.py --config configs/standard.yaml [...]

data -> rollout -> reward -> pairs -> log-probs -> objective -> update -> log, then the next step; when a self-play
round ends, the policy becomes its own opponent. This file is where the stages meet.
"""

import argparse

from gspo.algorithm.objective import find_algorithm
from gspo.algorithm.pairs import forks, preferences
from gspo.algorithm.self_play import SelfPlayModels, round_of
from gspo.algorithm.solutions import add_solution_rewards, add_solutions, prefer_solutions
from gspo.algorithm.update import learning_rate
from gspo.checkpoint.run_folder import latest_checkpoint, needs_evaluation
from gspo.config import Config
from gspo.data.batches import Batches
from gspo.data.prompts import load_splits
from gspo.distributed.world import World, process_group
from gspo.errors import UserError
from gspo.launch import check_launch, final_words
from gspo.metrics.evaluation import correct_of
from gspo.metrics.step_metrics import Clock, Meter, observe, peak_memory_gib
from gspo.metrics.tracker import sample_rows
from gspo.models.loading import load_model_config, load_tokenizer
from gspo.packing.balance import balance
from gspo.read_config import load_config
from gspo.reward.gold_check import require_gold
from gspo.reward.scorer import Scorer
from gspo.run import Run, held_out, save, start, test
from gspo.system.console import say
from gspo.system.program import guarded
from gspo.types import Experience, Groups, Rollout, Scores


def train(cfg: Config, world: World, check_only: bool = False) -> None:
    """Run, or resume, one training run: from its configuration to its final table."""
    tokenizer = load_tokenizer(cfg.model.path)
    scorer = Scorer(cfg.reward)
    model_config = load_model_config(cfg.model.path)
    splits = world.main_process_first(lambda: load_splits(cfg, tokenizer, model_config))
    batches = Batches(splits.train, cfg.data.train_batch_size, cfg.trainer.seed, cfg.data.shuffle, cfg.data.spaced)
    total = cfg.trainer.max_steps or cfg.trainer.total_epochs * batches.per_epoch

    check_launch(cfg, model_config, world, started=not check_only)
    world.broadcast_from_main(lambda: require_gold(scorer, splits.train, cfg.reward.check_rows))
    if check_only:
        return say(f"fine: {len(splits.train)} prompts, {total} steps of {batches.size} x {cfg.rollout.n} answers")

    run = start(cfg, world, model_config, tokenizer, splits, batches, scorer)
    state = run.state
    if state.step:
        say(f"{run.folder}: {state.step} of {total} steps done")
    elif splits.test and cfg.eval.before_and_after:
        test(run, "eval_before")
    if state.step == 0:
        held_out(run, 0, ends_round=True)

    with run.checkpoints as checkpoints:  # what is being written when something fails is written to its end
        alarm, signal = play(run, total)
        if state.step:
            save(run, at_once=True)
            checkpoints.require(state.step)
        run.tracker.close()
    if alarm:
        raise UserError(f"stopped after step {state.step}, with a checkpoint: {alarm}")
    if signal:
        return say(f"{signal}: left after step {state.step} of {total}; the same command goes on from there")
    if splits.test and cfg.eval.before_and_after and needs_evaluation(run.folder, "eval_after", state.step, world):
        test(run, "eval_after")
    if world.is_main:
        say(final_words(run.folder, latest_checkpoint(run.folder / "checkpoints")))


def play(run: Run, total: int) -> tuple[str, str]:
    """Take steps until there are `total` -> the alarm, and the signal, that ended it earlier, or "" and ""."""
    cfg, world, batches, scorer = run.cfg, run.world, run.batches, run.scorer
    algorithm = find_algorithm(cfg.objective.algorithm)
    models, sampler, state, tracker = run.models, run.sampler, run.state, run.tracker
    while state.step < total:
        if any(early := reasons_to_end(run)):
            return early
        step, clock = state.step, Clock(world.device)
        batch = batches.take()
        with clock("rollout"):
            models.refresh_sampler()
            places, rollout = sampler.generate_share(
                batch, cfg.rollout.n, run.sampling, world, step=step, on_group=scorer.begin
            )
        with clock("reward"):
            scores = scorer(rollout)
            batches.mark_solved(world.gather_rows(places, correct_of(scores).all(1)).tolist())
        with clock("reference"):
            places, rollout, scores, share = balance(places, rollout, scores, cfg.optim.minibatches, world)
            if algorithm.needs_solutions:
                rollout = add_solutions(rollout, sampler.tokenizer, sampler.end_id, models.policy.config, world)
            experience = gather_experience(rollout, places, scores, models, len(batch), cfg, world)
        with clock("update"):
            update = run.updater.run(experience, lr := learning_rate(step, total, cfg))

        state.step, last = step + 1, step + 1 == total
        state.count_non_finite(update.skipped, cfg.health.max_bad_steps, update.not_finite)
        metrics = Meter.merge(world.gather(observe(experience, scores, update, cfg.objective).state()))
        state.tokens_sampled += int(metrics["tokens"])
        metrics |= {"learning_rate": lr, "round": float(state.round), "tokens_sampled": float(state.tokens_sampled)}
        metrics["balance"] = share
        now = round_of(step + 1, total, cfg.selfplay.rounds)
        ends_round = last or now > state.round
        if ends_round or (cfg.eval.freq and state.step % cfg.eval.freq == 0):
            metrics |= held_out(run, step + 1, ends_round)
        if now > state.round:
            models.new_opponent()
            state.round = now
        metrics |= clock.metrics(metrics["tokens"]) | {"memory/peak_gib": peak_memory_gib(world.device)}
        tracker.log(state.step, metrics, total, causes={"skipped_updates": update.not_finite})
        tracker.samples(state.step, world.gather(sample_rows(experience, cfg.trainer.sample_rows)))
        run.checkpoints.commit()
        best = state.is_best(metrics) and cfg.trainer.keep_best
        if best or (cfg.trainer.save_freq and state.step % cfg.trainer.save_freq == 0):
            save(run)
    return "", ""


def reasons_to_end(run: Run) -> tuple[str, str]:
    """An alarm, of the last step or of the run resumed, and a signal to any rank: "" and "", mostly."""
    alarms, signals = zip(*run.world.gather((run.tracker.health.alarmed or "", run.preemption.by)), strict=True)
    return max(alarms), max(signals)


def gather_experience(
    rollout: Rollout,
    places: list[int],
    scores: Scores,
    models: SelfPlayModels,
    batch_groups: int,
    cfg: Config,
    world: World,
) -> Experience:
    """Rewards -> pairs, and the log-probs that the objective measures from."""
    reference, anchors = models.reference(rollout)
    rewards = add_solution_rewards(scores.rewards, rollout).to(world.device)
    beats = prefer_solutions(preferences(rewards, cfg.objective.margin), rollout.sampled)
    groups = Groups(anchors, rewards, beats, forks(rollout.tokens, rollout.lengths), rollout.lengths)
    return Experience(rollout, groups, reference, places, batch_groups, batch_pairs=int(world.sum(int(beats.sum()))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/standard.yaml", help="YAML preset (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="read configuration, data and reward function, then stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="see python -m gspo.config")
    args = parser.parse_intermixed_args()
    cfg = load_config(args.config, args.overrides)
    with process_group() as world:
        train(cfg, world, check_only=args.check)


def program() -> None:
    """Run `main` as the program train.py or gspo-train."""
    guarded(main, "interrupted; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    program()

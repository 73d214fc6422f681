"""Do what surrounds a run's steps: start, resume and save it, evaluate it, say why it stops (train.py has the loop)."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gspo.algorithm.critic import CriticUpdater
from gspo.algorithm.gold_solutions import add_solutions
from gspo.algorithm.held_out_pairs import HeldOutPairs
from gspo.algorithm.objective import as_trained, find_algorithm, learns_from_rows
from gspo.algorithm.pairs import has_contrast
from gspo.algorithm.self_play_models import SelfPlayModels, kl_divergence_to, round_of, win_rate
from gspo.algorithm.update import Updater, make_optimizer
from gspo.checkpoint.checkpoints import Checkpoints, State, Trained
from gspo.checkpoint.evaluations import settings_of, write_evaluation
from gspo.checkpoint.fingerprints import of_model, of_source, of_template
from gspo.checkpoint.restore import load_held_out, load_order, load_state, restore
from gspo.checkpoint.run_folder import open_run, save_reward_function
from gspo.config import Config
from gspo.data.batches import Batches
from gspo.data.prompts import Splits, group_size, scorable
from gspo.data.stored_rows import stored_groups
from gspo.distributed.world import World
from gspo.launch_checks import describe_reward, say_inputs, say_what_changed
from gspo.memory.plan import plan_memory
from gspo.metrics.evaluation import answer, correct_of, report, summary_line
from gspo.metrics.health import MOSTLY_CUT_OFF, advice
from gspo.metrics.run_log import RunLog
from gspo.models.precision import DTYPES, allow_tf32, choose_precision
from gspo.reward.scorer import Scorer
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import EVAL, Sampler
from gspo.system.console import phase, say
from gspo.system.language import word
from gspo.system.malloc import return_freed_memory
from gspo.system.preemption import Preemption
from gspo.system.time_limit import TimeLimit
from gspo.types import Rollout

FEW_PROMPTS = 8  # of fewer one cannot tell whether a policy learns from prompts like these


@dataclass(frozen=True)
class StopReason:
    """Why a run ends before its last step."""

    kind: Literal["alarm", "goal", "time", "signal"]
    text: str  # the alarm's message, what was reached, or the signal's name


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
    log: RunLog
    state: State
    folder: Path
    checkpoints: Checkpoints
    preemption: Preemption
    time_limit: TimeLimit
    total_steps: int
    critic: CriticUpdater | None = None  # of PPO
    held_out: HeldOutPairs | None = None  # of this round


def fingerprints_of(cfg: Config, splits: Splits, scorer: Scorer, tokenizer: Any) -> dict[str, str]:
    """Return the fingerprints of a run's model, chat template, reward function and data."""
    found = {"model.path": of_model(cfg.model.path), "data.chat_template": of_template(tokenizer)}
    return found | {"reward.path": of_source(scorer.pool.source)} | splits.fingerprints


def start_run(
    cfg: Config,
    world: World,
    model_config: Any,
    tokenizer: Any,
    splits: Splits,
    batches: Batches,
    scorer: Scorer,
    total_steps: int,
) -> Run:
    """Open the run's folder, and the models: as they are at its latest checkpoint, if there is one."""
    prints = fingerprints_of(cfg, splits, scorer, tokenizer) if world.is_main else {}
    folder, resume = open_run(cfg, world, prints)
    state, held_out = load_state(resume) if resume else State(), None
    if world.is_main:
        save_reward_function(folder, scorer.pool.source, state.step)
    wanted = state.precision or cfg.model.precision
    state.precision, measured = world.broadcast_from_main(lambda: choose_precision(wanted, world.device, model_config))
    on = f"{world.devices()}, {state.precision}"
    say_inputs(cfg.model.path, splits, describe_reward(scorer), on, folder)
    if measured:
        say(f"model.precision=auto: {state.precision} ({measured})")
    longest = max(len(splits.train[k].ids) for k in range(min(len(splits.train), 256)))
    n = group_size(cfg, splits.train)
    planned, memory = plan_memory(replace(cfg, rollout=replace(cfg.rollout, n=n)), world, state.precision, longest)
    say(memory)
    cfg = replace(planned, rollout=replace(planned.rollout, n=cfg.rollout.n))
    trained = as_trained(cfg)
    models = SelfPlayModels(trained, world, DTYPES[state.precision], weights_from=resume)
    optimizer = make_optimizer(models.policy, cfg)
    critic = _open_critic(cfg, models, world)
    if resume:
        restore(resume, models.trained, optimizer, models.frozen_to_keep(), state, _critic_of(critic))
        batches.load_state(load_order(resume))
        say_what_changed(state, cfg, total_steps, len(splits.val) if scorable(splits.val) else 0)
        vocab_size = models.policy.config.get_text_config().vocab_size
        held_out = HeldOutPairs.read(load_held_out(resume, vocab_size), splits.val)
        if held_out is None:
            state.pair_metrics = {}
            if state.round_rewards is not None and splits.val:
                say(f"{resume} has no held-out responses: until a round begins, pairs are those of training batches.")
    state.planned_steps, state.total_steps = state.planned_steps or total_steps, total_steps
    updater = Updater(models.policy, models.head, optimizer, trained, world, models.autocast)
    sampler = _open_sampler(cfg, models, tokenizer, world)
    allow_tf32(cfg.model.tf32, world.device)
    full_reward = max(scorer.of_each.correct_at, 1e-6)
    sampling, log = Sampling.of(cfg.rollout), RunLog(folder, cfg, state.step, state.precision, full_reward)
    checkpoints, preemption = Checkpoints(folder, cfg, tokenizer, world), Preemption()
    return Run(
        cfg, world, splits, batches, scorer, models, sampler, sampling, updater, log, state, folder, checkpoints,
        preemption, TimeLimit(cfg.trainer.time_limit), total_steps, critic, held_out,
    )  # fmt: skip


def _open_sampler(cfg: Config, models: SelfPlayModels, tokenizer: Any, world: World) -> Sampler:
    """Open the sampler on the models' copy, or share, of the policy's weights."""
    return Sampler(
        models.sampler,
        tokenizer,
        world.device,
        engine=cfg.rollout.engine,
        max_slots=cfg.rollout.max_slots,
        kv_memory_gib=cfg.rollout.kv_memory_gib,
        seed=cfg.trainer.seed,
        tp=cfg.rollout.tensor_model_parallel_size,
        agree=models.agree,
        skip_special_tokens=cfg.rollout.skip_special_tokens,
    )


def _open_critic(cfg: Config, models: SelfPlayModels, world: World) -> CriticUpdater | None:
    """Open PPO's critic, where the algorithm needs one."""
    if not find_algorithm(cfg.objective.algorithm).needs_critic:
        return None
    return CriticUpdater(models.new_critic(), models.policy, cfg, world, models.autocast)


def stop_reason(run: Run) -> StopReason | None:
    """Return why to end before the next step, the same on every rank.

    The alarm or the goal of a step, also of one before a resumed run's checkpoint; the time limit; a signal to a rank.
    """
    mine = {
        "alarm": run.log.health.alarmed or "",
        "goal": run.log.stop_when.reached,
        "time": run.time_limit.reached(),
        "signal": run.preemption.signal_name,
    }
    everyones = run.world.gather(mine)
    said = {kind: max(reasons[kind] for reasons in everyones) for kind in mine}
    return next((StopReason(kind, text) for kind, text in said.items() if text), None)


def asked_to_leave(run: Run) -> StopReason | None:
    """Return the signal that came to a rank, the same on every rank."""
    name = max(run.world.gather(run.preemption.signal_name))
    return StopReason("signal", name) if name else None


def save_checkpoint(run: Run, at_once: bool = False) -> None:
    """Begin a checkpoint; a run that resumes from it goes on as if it had not stopped."""
    models, optimizer = run.models, run.updater.optimizer
    small_files = {"order": run.batches.state(), "held_out": run.held_out.tensors() if run.held_out else {}}
    critic = _critic_of(run.critic)
    run.checkpoints.save(run.state, models.trained, optimizer, models.frozen_to_keep(), small_files, at_once, critic)


def _critic_of(updater: CriticUpdater | None) -> dict[str, Trained]:
    """Return the critic and its optimizer by the name of their files."""
    return {"critic": (updater.critic, updater.optimizer)} if updater else {}


def evaluation_settings(run: Run) -> dict[str, Any]:
    """Return what the numbers of an evaluation on the test prompts depend on, of all that a run may change."""
    return settings_of(run.cfg.eval.n, run.splits.fingerprints.get("data.test_files", ""), run.scorer.pool.source)


def measure_at_first(run: Run, evaluates: bool) -> None:
    """Measure the policy before the first step: on the test prompts, where the run `evaluates` them, and on the
    held-out ones, whose responses the first round is compared with."""
    if evaluates:
        evaluate_run(run, "eval_before")
    with phase("before round 1"):
        metrics = evaluate_held_out(run, round_ended=False, round_begins=True)
    run.log.before_training(metrics)
    if text := _without_contrast(run):
        say(text)


def _without_contrast(run: Run) -> str:
    """Return what to say where nearly all held-out prompts teach nothing, or "": a run on such prompts cannot learn."""
    rewards, algorithm = run.state.round_rewards or [], find_algorithm(run.cfg.objective.algorithm)
    if len(rewards) < FEW_PROMPTS or algorithm.needs_solutions or learns_from_rows(run.cfg):
        return ""
    margin = run.cfg.objective.margin if algorithm.uses_margin else 0.0
    differing = int(has_contrast(torch.tensor(rewards), margin).sum())
    if differing >= run.cfg.health.paired_groups_min * len(rewards):
        return ""
    apart = f", by more than objective.margin = {margin:g}" if algorithm.uses_margin else ""
    return (
        f"warning, before step 1: only {differing} of {len(rewards)} held-out prompts have responses that are "
        f"rewarded differently{apart}. Nothing is learned from the others: if the training prompts are like these, "
        "take easier ones (harder ones where the reward is near 1), raise rollout.n, or have the reward function "
        "tell wrong answers apart."
    )


def evaluate_run(run: Run, name: Literal["eval_before", "eval_after"]) -> None:
    """Evaluate the policy on the test prompts, sampled and greedy, and write the report to `name`.json of the run."""
    when, began, limit = name.replace("eval_", "") + " training", time.monotonic(), run.cfg.health.cutoff_at_once
    prompts = f"{len(run.splits.test)} prompts x {run.cfg.eval.n} responses and a greedy one"
    say(f"{when}: {prompts}" + "; eval.before_and_after=false skips it" * (name == "eval_before"))
    run.models.refresh_sampler()
    with phase(when):
        answers = answer(run.sampler, run.scorer, run.splits.test, run.cfg.eval.n, run.sampling, run.world)
    run.log.progress.after_s = time.monotonic() - began
    if run.world.is_main:
        result = report(answers)
        if name == "eval_before":
            say(f"{when}: {summary_line(result)}")
        if answers.cut_off > limit:
            said = advice(MOSTLY_CUT_OFF.says.format(value=answers.cut_off), MOSTLY_CUT_OFF.cure)
            say(f"warning, {word(when)}: {said}.")
        try:
            write_evaluation(run.folder, name, run.state.step, evaluation_settings(run), result, answers.rows)
        except OSError as e:
            say(f"warning: {name}.json cannot be written ({e.strerror}); reward_mean is {result['reward_mean']:.3f}")


def end_round_if_over(run: Run) -> dict[str, float]:
    """Evaluate held-out prompts where due, and begin the next round where this one is over; return the metrics."""
    cfg, state = run.cfg, run.state
    next_round = round_of(state.step, state.planned_steps, cfg.selfplay.rounds)
    round_begins = next_round > state.round
    round_ended = state.step == run.total_steps or round_begins
    evaluated = round_ended or (cfg.eval.freq and state.step % cfg.eval.freq == 0)
    if run.held_out and (evaluated or state.step % run.held_out.steps_between(run.batches.size) == 0):
        state.pair_metrics = run.held_out.measure(run.models)
    metrics = dict(state.pair_metrics)  # of this round
    if evaluated:
        with phase("held-out prompts"):
            metrics |= evaluate_held_out(run, round_ended, round_begins)
        return_freed_memory()
    if round_begins:
        run.models.new_opponent()
        state.round = next_round
    return metrics


def say_round_begins(run: Run, round_before: float) -> None:
    """Print that the next step begins a round, where it does."""
    if run.state.round > round_before and run.state.step < run.total_steps:
        say(f"round {run.state.round + 1} begins: the opponent is now the policy of step {run.state.step}")


def evaluate_held_out(run: Run, round_ended: bool, round_begins: bool) -> dict[str, float]:
    """Sample and score responses to the held-out prompts; return the metrics.

    When a round ended, they are compared with those of its beginning; when one begins, they are kept for that. Held-out
    rows that hold responses give pairs by themselves, and are sampled for where their ground truth is known.
    """
    cfg, world, state, scorer = run.cfg, run.world, run.state, run.scorer.of_each
    if not run.splits.val:
        if round_begins:
            state.round_rewards, state.pair_metrics, run.held_out = None, {}, None  # they are of an earlier round
        return {}
    stored = run.splits.val[0].stored is not None
    if round_begins and stored:
        val, device = run.splits.val[:], world.device
        mine = world.places(len(val))
        places, rollout, scores = stored_groups(val, mine, run.sampler.tokenizer, run.sampler.end_id, device)
        keep_held_out_pairs(run, places, rollout, world.gather_rows(places, scores.rewards))
    if not scorable(run.splits.val):
        return {}
    run.models.refresh_sampler()
    places, rollout = run.sampler.generate_share(
        run.splits.val, cfg.rollout.n, run.sampling, world, purpose=EVAL, step=state.step, on_group=scorer.begin
    )
    scores = scorer(rollout)
    rewards = world.gather_rows(places, scores.rewards)
    correct = world.gather_rows(places, correct_of(scores, scorer.correct_at, scorer.ranks).float())
    metrics = {"heldout/reward_mean": float(rewards.mean())}
    if not correct.isnan().any():  # else the rewards are relative: they say nothing of right and wrong
        metrics["heldout/accuracy"] = float(correct.mean())
    if state.step > 0:
        metrics["kl_to_initial"] = kl_divergence_to(run.models, run.models.initial(), rollout, world)
    if round_ended and state.round_rewards is not None:
        before = torch.tensor(state.round_rewards)
        both = min(len(rewards), len(before))  # eval.round_prompts may have changed since
        metrics["win_rate"], metrics["win_rate/ties"] = win_rate(rewards[:both], before[:both], cfg.objective.margin)
    if round_begins:
        state.round_rewards = rewards.tolist()
    if round_begins and not stored:
        keep_held_out_pairs(run, places, rollout, rewards)
    return metrics


def keep_held_out_pairs(run: Run, places: list[int], rollout: Rollout, rewards: Tensor) -> None:
    """Keep this rank's held-out rollout and all ranks' rewards [P, N] of a round that begins, and measure its pairs.

    An algorithm that learns from gold solutions needs one for every held-out row; where one is missing nothing is kept.
    """
    models, sampler, val, state = run.models, run.sampler, run.splits.val, run.state
    run.held_out, state.pair_metrics = None, {}
    if find_algorithm(run.cfg.objective.algorithm).needs_solutions:
        if not all(val[p].extra_info.get("solution") for p in range(len(val))):
            if not state.step:
                say("data.val_files: a row has no `solution`, so preference_accuracy is that of the training batch.")
            return
        rollout = add_solutions(rollout, sampler.tokenizer, sampler.end_id, models.policy.config, run.world)
    run.held_out = HeldOutPairs.keep(val, places, rollout, rewards, models)
    state.pair_metrics = run.held_out.measure(models)

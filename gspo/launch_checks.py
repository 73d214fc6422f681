"""Check a run before it starts, and say at its end what it reached and what to type next."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from gspo.algorithm.cutoffs import check_cutoffs
from gspo.algorithm.objective import find_algorithm, learns_from_rows
from gspo.algorithm.self_play_models import round_of
from gspo.algorithm.update import learning_rate
from gspo.checkpoint.checkpoints import State
from gspo.checkpoint.evaluations import comparable_evaluations
from gspo.config import Config
from gspo.data.prompts import Splits
from gspo.distributed.sharding import check_shard_size
from gspo.distributed.tensor_parallel import check_tensor_parallel
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.metrics.evaluation import table
from gspo.metrics.run_log import GLOSSARY, check_trackers
from gspo.metrics.stop_when import StopWhen
from gspo.models.attention_support import check_length
from gspo.models.loading import model_without_weights
from gspo.models.lora import Lora, find_targets, require_peft
from gspo.models.precision import DTYPES
from gspo.reward.scorer import Scorer
from gspo.rollout.engines import engine_class
from gspo.rollout.sampler import shares_weights
from gspo.rollout.tree import Tree
from gspo.system.cells import flush_left
from gspo.system.console import duration, say
from gspo.system.language import word
from gspo.system.output import printable
from gspo.system.time_limit import STARTED, TimeLimit
from gspo.types import Prompt

FIRST_PROMPT = 800  # characters of it that are shown
PYTHON = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else "python"


def check_launch(cfg: Config, model_config: Any, world: World, started: bool = True) -> None:
    """Check the configuration against the ranks, the model and the tables.

    UserError where torchrun started another number of ranks, the model cannot do what is asked, or a name is unknown.
    `started` is false for `--check`, which runs on one rank.
    """
    wanted = (cfg.trainer.n_gpus or 0) * (cfg.trainer.nnodes or 1)
    check_tensor_parallel(model_config, wanted or world.size, cfg.rollout.tensor_model_parallel_size)
    check_shard_size(cfg.model.shard_size, wanted or world.size)
    check_trackers(cfg.trainer.trackers)
    TimeLimit(cfg.trainer.time_limit)
    StopWhen(cfg.trainer.stop_when, GLOSSARY)
    check_cutoffs(cfg)
    _check_algorithm(cfg)
    _check_lora(cfg)
    engine_class(cfg.rollout.engine)
    Tree.of(cfg.rollout)
    precision = DTYPES.get(cfg.model.precision, torch.float32)  # `auto` is decided later
    shares_weights(cfg.rollout.weights, (wanted or world.size) > 1, precision, bool(cfg.model.lora))
    # The critic values a response that is cut off before a token more.
    behind = int(find_algorithm(cfg.objective.algorithm).needs_critic)
    check_length(model_config, cfg.data.max_prompt_length + cfg.rollout.max_new_tokens + behind)
    if started and wanted not in (0, world.size):
        raise UserError(
            f"trainer.n_gpus x trainer.nnodes asks for {wanted} processes, this run has {world.size}. "
            f"Start it with torchrun --nproc_per_node={cfg.trainer.n_gpus} train.py ... (or ./train.sh --n_gpus)."
        )


def _check_algorithm(cfg: Config) -> None:
    """Raise UserError where the objective is unknown, or other settings do not go with it."""
    algorithm = find_algorithm(cfg.objective.algorithm)
    if cfg.objective.kl_in == "reward" and not algorithm.needs_critic:
        raise UserError(
            f"objective.kl_in = reward gives tokens rewards, and {cfg.objective.algorithm} has one reward a response; "
            "use objective.algorithm=ppo or objective.kl_in=loss."
        )
    if algorithm.needs_critic and learns_from_rows(cfg):
        raise UserError(
            f"objective.algorithm = {cfg.objective.algorithm} learns from what the policy samples; rollout.source=rows "
            "goes with the objectives that compare responses."
        )
    several = cfg.optim.epochs_per_rollout * cfg.optim.minibatches
    if algorithm.from_rows and several > 1:
        raise UserError(
            f"objective.algorithm = {cfg.objective.algorithm} takes one optimizer step a batch, not {several} "
            "(optim.epochs_per_rollout x optim.minibatches): what clips the later ones is made for responses that the "
            "policy sampled. Lower data.train_batch_size for more steps, raise trainer.total_epochs for more passes."
        )


def _check_lora(cfg: Config) -> None:
    """Raise UserError where model.lora has a wrong value, peft is not here, or other settings do not go with it."""
    lora = Lora.of(cfg.model.lora)
    if lora is None:
        return
    require_peft()
    find_targets(model_without_weights(cfg.model.path), lora)
    if find_algorithm(cfg.objective.algorithm).needs_critic and not cfg.critic.shared:
        raise UserError(
            "model.lora trains an adapter of the policy, and critic.shared = false a whole critic beside it, with all "
            "the memory that model.lora saves. Set critic.shared=true, or leave model.lora empty."
        )


def say_notes(cfg: Config, total: int | None = None) -> None:
    """Print what may surprise about a configuration that is allowed, and about its `total` of steps, if given."""
    if total:
        check_steps(cfg, total)
    if cfg.model.lora and cfg.optim.learning_rate < 1e-5:
        say(
            f"note: optim.learning_rate = {cfg.optim.learning_rate:g} is made for all weights of a model; an adapter "
            "(model.lora) hardly learns with it: about ten times as much suits one."
        )
    if cfg.model.path is None and cfg.optim.learning_rate < 1e-5:
        say(
            f"note: optim.learning_rate = {cfg.optim.learning_rate:g} is made for models of billions of parameters; "
            "the embedded one hardly learns with it; 3e-4 suits it."
        )
    if learns_from_rows(cfg):
        say(
            "responses are read from the training rows: log-probs are at temperature 1, there is no KL term (it needs "
            "samples of the policy), and the reference's log-probs stand for those of whatever sampled them."
        )
        if cfg.objective.anchor_model == "opponent" and cfg.selfplay.rounds > 1:
            say(
                f"note: the anchor is the opponent, so what is subtracted becomes the policy itself when each of the "
                f"{cfg.selfplay.rounds} rounds begins; objective.anchor=initial stays with the initial model."
            )
    elif cfg.rollout.top_p < 1.0 or cfg.rollout.top_k or cfg.rollout.min_p:
        say(
            "warning: with top_p, top_k or min_p responses are not sampled from the distribution that is trained: "
            "kl_divergence and the KL term do not see tokens that are cut off (kl_divergence is at most KL / z where a "
            "share z of the probability is kept, and may be far lower), and entropy is of all tokens. rollout.top_p=1, "
            "rollout.top_k=0 and rollout.min_p=0 have no such bias."
        )
    tree = Tree.of(cfg.rollout)
    if tree is not None and tree.looks_ahead:
        say(
            f"warning: rollout.branch_at = {tree.at} chooses places by what follows them, which biases the gradient "
            "(docs/algorithm.md); entropy and even do not."
        )


def describe_reward(scorer: Scorer) -> str:
    """Return the reward function's name, and what it takes for a right response."""
    each = scorer.of_each
    if each.ranks:
        return f"{scorer.title}, which says by `acc` what is right"
    return f"{scorer.title}, right from {each.correct_at:g} on (reward.correct_at) or by `acc`"


def say_inputs(model: str | None, splits: Splits, reward: str, on: str = "", folder: Path | None = None) -> None:
    """Print one line that names the devices and the precision (`on`), the model, the data files with their numbers of
    rows, the reward function and the run's folder."""
    found = {name: getattr(splits, name) for name in ("train", "val", "test")}
    data = "; ".join(f"{name} {prompts.files()}" for name, prompts in found.items() if prompts)
    parts = [on] if on else []
    parts += [f"model: {model or 'the embedded model'}", f"data: {data}", f"reward: {reward}"]
    say(" | ".join([*parts, f"kept in {folder}"] if folder else parts))


def first_prompt(prompts: Sequence[Prompt], tokenizer: Any) -> str:
    """Return a block with the first training prompt as the model reads it, chat template applied."""
    ids = prompts[0].ids
    text = tokenizer.decode(ids)
    if len(text) > FIRST_PROMPT:
        text = f"{text[: FIRST_PROMPT // 2]} ... {text[-FIRST_PROMPT // 2 :]}"
    plain = "" if tokenizer.chat_template else "; there is no chat template: data.chat_template=FILE gives one"
    title = f"first prompt, as the model reads it ({len(ids)} tokens{plain}):"
    return "\n    ".join([title, *map(printable, text.splitlines())])


def check_steps(cfg: Config, total: int) -> None:
    """Warn where the steps do not suffice for the rounds or the warm-up, and where the last one cannot learn."""
    o, rounds, last = cfg.optim, cfg.selfplay.rounds, learning_rate(total - 1, total, cfg)
    if total < rounds:
        say(
            f"warning: selfplay.rounds = {rounds}, but the run ends after step {total}, so some rounds have none. "
            "Lower selfplay.rounds, or take more steps (trainer.max_steps)."
        )
    if o.warmup_steps >= total:
        say(
            f"warning: optim.warmup_steps = {o.warmup_steps}, but the run ends after step {total}: the learning rate "
            f"still rises at its last step, to {last:g} of {o.learning_rate:g}. Lower optim.warmup_steps."
        )
    if last == 0:
        say(
            f"warning: optim.schedule = {o.schedule} ends at a learning rate of 0, so step {total}, the last, learns "
            "nothing. Set optim.min_lr_ratio, for example to 0.1."
        )


def say_what_changed(state: State, cfg: Config, total: int, held_out: int) -> None:
    """Say what another number of steps, or of held-out prompts, changes in a run that goes on."""
    planned, before, step = state.planned_steps, state.total_steps, state.step
    if before and before != total and step < total:
        old, new = learning_rate(min(step, before - 1), before, cfg), learning_rate(step, total, cfg)
        rounds, length = round_of(total - 1, planned, cfg.selfplay.rounds) + 1, planned / cfg.selfplay.rounds
        rate = ""
        if old != new:
            rate = (
                f" optim.schedule = {cfg.optim.schedule} is spread over all of them, so the learning rate goes from "
                f"{old:.3g} to {new:.3g} at step {step + 1}; for another one, begin a run from the checkpoint "
                "(trainer.resume=FOLDER, another trainer.run_name, optim.learning_rate)."
            )
        say(
            f"warning: this run was to have {before} steps, and now has {total}.{rate} Rounds keep their length of "
            f"{length:g} steps, so there are {rounds}."
        )
    kept = 0 if state.round_rewards is None else len(state.round_rewards)
    if kept != held_out:
        both = min(kept, held_out)
        effect = f"it is compared on the first {both} of them" if both else "it has no win rate"
        say(f"eval.round_prompts was {kept} when this round began, and is {held_out} now: {effect}.")


def say_fine(cfg: Config, prompts: int, total: int, n: int) -> None:
    """Say that a run could start, and what its steps are: n responses to each prompt."""
    size = cfg.data.train_batch_size
    all_of_them = f"; data.train_batch_size = {size}, so a batch holds all {prompts} prompts" if prompts < size else ""
    say(f"fine: {prompts} prompts, {total} steps of {min(size, prompts)} x {n} responses{all_of_them}")


def say_progress(folder: Path, step: int, cfg: Config, total: int) -> None:
    """Say how far a run that goes on has come; where that is beyond its last step, that nothing is trained."""
    if step <= total:
        return say(f"{folder}: {step} of {total} steps done")
    name = "trainer.max_steps" if cfg.trainer.max_steps else "trainer.total_epochs"
    say(
        f"warning: {folder} has done {step} steps, and {name} ends it after {total}, so nothing is trained. To go on, "
        f"raise {name}; to start anew, give another trainer.run_name, or trainer.resume=never."
    )


def final_words(folder: Path, checkpoint: Path, state: State | None = None) -> str:
    """Return the table of the run, before against after, its best checkpoint, and what to type next."""
    reports, note = comparable_evaluations(folder, int(checkpoint.name.rpartition("_")[2]))
    if reports:
        first = next(iter(reports.values()))
        lines = [
            f"\n{first['prompts']} held-out prompts, {first['samples']} samples each, 95 % intervals",
            table(reports),
        ]
    else:
        lines = ["\nnothing was evaluated (eval.before_and_after, data.test_files)"]
    lines += [note] if note else []
    best = folder / "checkpoints" / "best"
    lines.append(f"\ndone in {duration(time.monotonic() - STARTED)}; the last checkpoint: {checkpoint}")
    if state and state.best_step and best.exists():
        lines.append(f"the best: {best}, step {state.best_step}, held-out accuracy {state.best_accuracy:.3f}")
    evaluate = os.path.relpath(Path(__file__).parent.parent / "eval.py")
    following = {
        "report": f"{quote(PYTHON)} -m gspo.report {quote(str(folder))}",
        "curves": f"{quote(PYTHON)} -m tensorboard.main --logdir {quote(str(folder.parent))}",
        "evaluate": f"{quote(PYTHON)} {quote(evaluate)} {quote(str(checkpoint))}",
        "use": f"transformers.AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})",
        "samples": f"{quote(PYTHON)} -m gspo.samples {quote(str(folder))}",
    }
    lines += ["\nnext:", *(f"  {flush_left(word(name), 9)}  {what}" for name, what in following.items())]
    return "\n".join(lines)

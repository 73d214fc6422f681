"""Evaluate a checkpoint, or any Hugging Face causal language model, on prompts with checkable answers.

    python eval.py outputs/checkpoints [--json FILE] [--compare OTHER]
    python eval.py Qwen/Qwen2.5-0.5B-Instruct --data data/gsm8k/train_test.json --max_new_tokens 256
    python eval.py --config my.yaml --limit 32 --n 4

Prints greedy accuracy, unbiased pass@k, maj@k and the mean reward with 95 % intervals, by data source where there are
several. For a checkpoint of a run, data, reward function, system prompt, chat template and sampling are the run's
unless given here, as flags or as settings: data.system_prompt="Be brief." data.chat_template=FILE rollout.top_p=0.9 ...
(python -m gspo.parameters). --config takes them from the file of a run that has not begun, and so its model, where none
is named, and its data.test_files, or else its data.val_files: what can the model do before it is trained?
"""

import argparse
import re
from pathlib import Path
from shlex import quote

import gspo  # noqa: F401 -- before torch

# isort: split
import torch

from gspo.algorithm.self_play_models import win_rate
from gspo.checkpoint import fingerprints
from gspo.checkpoint.adapter_checkpoints import base_of, load_policy
from gspo.checkpoint.find_runs import checkpoint_of, config_of
from gspo.config import Config
from gspo.data.prompts import EMBEDDED, load_splits
from gspo.distributed.world import World, process_group
from gspo.embedded import MODEL_DIR
from gspo.errors import UserError
from gspo.launch_checks import say_inputs
from gspo.metrics.evaluation import Answers, answer, report, table
from gspo.models.loading import check_weights, load_model_config, load_tokenizer
from gspo.models.model_folder import called
from gspo.models.precision import DTYPES, allow_tf32, choose_precision
from gspo.program_settings import SAMPLING, parse_with_settings
from gspo.read_config import keys_of, load_config, set_value
from gspo.read_paths import check_path, home_path
from gspo.reward import reward_func
from gspo.reward.gold_check import find_correct_at
from gspo.reward.scorer import Scorer
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import Sampler
from gspo.system.console import say
from gspo.system.files import write_json, write_json_lines
from gspo.system.help_text import HelpText
from gspo.system.program import guarded

FLAGS = {  # flag -> the parameter that it sets
    "n": "eval.n",
    "limit": "eval.prompts",
    "temperature": "rollout.temperature",
    "max_new_tokens": "rollout.max_new_tokens",
    "reward_func": "reward.path",
    "precision": "model.precision",
    "seed": "trainer.seed",
    "data": "data.test_files",
}
SETTINGS = re.compile(  # what an evaluation reads
    rf"(data\.(?!train_|val_|shuffle|spaced)|reward\.).*|{SAMPLING}|eval\.(n|prompts)|model\.(precision|tf32)"
    r"|trainer\.seed|objective\.margin"
)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpText)
    parser.add_argument("model", nargs="?", help="checkpoint, run, HF folder or name (default: embedded)")
    parser.add_argument("--config", metavar="FILE", help="YAML file, or a preset's name, of a run that has not begun")
    parser.add_argument("--compare", metavar="OTHER", help="a second model; prints the first one's win rate against it")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="JSON, JSONL or parquet prompts")
    parser.add_argument("--n", type=int, help="samples per prompt (default 8)")
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument("--temperature", type=float, help="of sampling (default 0.9)")
    parser.add_argument("--max_new_tokens", type=int, help="longest response, in tokens")
    parser.add_argument("--reward_func", metavar="FILE", help="Python file with compute_score")
    parser.add_argument("--precision", help="auto, fp32 or bf16")
    parser.add_argument("--seed", type=int, help="of sampling")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there as well")
    parser.add_argument("--answers", metavar="FILE", type=Path, help="write prompts, answers and rewards there (JSONL)")
    return parse_with_settings(parser, SETTINGS, "an evaluation")


def configure(args: argparse.Namespace, model: Path | None) -> Config:
    """Return the configuration: the run's where the model is a run's checkpoint, changed by the command line."""
    run_config = config_of(model) if model else None
    from_run = run_config is not None
    if from_run and args.config:
        raise UserError(
            f"--config {args.config}: {model} is a checkpoint of a run, which is evaluated by the run's own settings. "
            "Leave --config out; settings beside the flags change them (section.key=value)."
        )
    source = run_config if from_run else args.config
    cfg, given = load_config(source, args.settings, note=say), keys_of(args.settings)
    cfg.data.test_files = cfg.data.test_files or (cfg.data.val_files if args.config else [])
    has_data = bool(args.data) or "data.test_files" in given or bool(args.config and cfg.data.test_files)
    if not source and not has_data and "rollout.max_new_tokens" not in given:
        cfg.rollout.max_new_tokens = 64  # the embedded task
    if from_run and not args.reward_func and "reward.path" not in given:
        _refuse_code_of_the_run(run_config.parent, cfg.reward.path)
    if from_run and "data.chat_template" not in given:
        _take_chat_template(cfg, model)
    for flag, key in FLAGS.items():
        value = getattr(args, flag)
        if value is not None and key in given:
            raise UserError(f"--{flag} and {key} are the same; leave one of the two out.")
        if value is not None:
            set_value(cfg, key, value, "command line")
    if not from_run and model and not has_data:
        raise UserError(
            f"{model} is no checkpoint of a run, so it is not known what to evaluate it on: give --data FILE; "
            "--data embedded takes the embedded equations."
        )
    if from_run:
        _say_other_reward(run_config.parent, cfg.reward.path)
    if has_data:
        cfg.data.train_files = cfg.data.val_files = cfg.data.test_files
    cfg.eval.round_prompts = 0
    return cfg


def _refuse_code_of_the_run(run: Path, path: str | None) -> None:
    """Raise UserError where the reward function lies in the run's folder, which may come from anybody."""
    if not path or (Path(path).is_file() and not Path(path).resolve().is_relative_to(run.resolve())):
        return
    where = "which lies in that folder" if Path(path).is_file() else "which is not here"
    raise UserError(
        f"{run} was scored by {path!r}, {where}. A reward function is code, and code in the folder of a run is run "
        f"only when you name it: --reward_func {quote(str(run / 'reward_func.py'))} (read it first), or --reward_func "
        "with a file of yours."
    )


def _say_other_reward(run: Path, path: str | None) -> None:
    """Say where the reward function is not the one that the run was scored by, by the hash that it kept."""
    kept = fingerprints.read(run).get("reward.path")
    source = Path(path or reward_func.__file__)
    if kept and source.is_file() and fingerprints.of_source(source.read_text("utf-8-sig", "replace")) != kept:
        say(f"note: {path or 'the default reward function'} is not what {run} was scored by: it has changed since")


def named(model: str) -> str:
    """Return the folder of the embedded model for the word `embedded`, unless that is a folder here."""
    return str(MODEL_DIR) if model == EMBEDDED and not Path(model).exists() else model


def check_model(name: str, place: str) -> None:
    """Raise UserError, which names its place on the command line, where a model cannot be opened."""
    with called(place):
        load_model_config(base_of(name))
        load_tokenizer(name)
        check_weights(base_of(name))


def _take_chat_template(cfg: Config, model: Path) -> None:
    """Set the run's own chat template, as its checkpoint keeps it: the file may have changed since, or be gone."""
    kept = model / "chat_template.jinja"
    cfg.data.chat_template = str(kept) if cfg.data.chat_template and kept.is_file() else None


def evaluate(name: str | None, cfg: Config, world: World) -> Answers:
    """Sample and score responses of one model to the test prompts."""
    config, tokenizer = load_model_config(base_of(name)), load_tokenizer(name, cfg.data.chat_template)
    precision, _ = world.broadcast_from_main(lambda: choose_precision(cfg.model.precision, world.device, config))
    model = load_policy(name, DTYPES[precision]).to(world.device)
    splits = world.main_process_first(lambda: load_splits(cfg, tokenizer, model.config, only_test=True))
    scorer = Scorer(cfg.reward, world.device)
    if cfg.reward.path and cfg.reward.check_rows:
        scorer.of_each.correct_at = world.broadcast_from_main(
            lambda: find_correct_at(scorer, splits.test, cfg.reward.check_rows)
        )
    say_inputs(name, splits, scorer.title)
    sampler = Sampler(
        model,
        tokenizer,
        world.device,
        engine=cfg.rollout.engine,
        max_slots=cfg.rollout.max_slots,
        kv_memory_gib=cfg.rollout.kv_memory_gib,
        seed=cfg.trainer.seed,
        skip_special_tokens=cfg.rollout.skip_special_tokens,
    )
    allow_tf32(cfg.model.tf32, world.device)
    return answer(sampler, scorer, splits.test, cfg.eval.n, Sampling.of(cfg.rollout), world)


def run_evaluation(args: argparse.Namespace, world: World) -> None:
    """Evaluate the model, compare it with the other where there is one, and print and write the numbers."""
    for what, text in {"the model's name": args.model, "--compare": args.compare}.items():
        if text is not None and not text.strip():
            raise UserError(f"{what} is empty (a variable of the shell that is not set?). Give one, or leave it out.")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: it must be at least 1. Leave it out to evaluate on every prompt.")
    written = {"--json": args.json, "--answers": args.answers}
    for place, text in {"MODEL": args.model, "--compare": args.compare, **written}.items():
        check_path(str(text or ""), place, written=place in written)
    model = args.model or (load_config(args.config).model.path if args.config else None)
    name, other = (checkpoint_of(named(text)) if text else None for text in (model, args.compare))
    name = None if model and named(model) != model else name  # which is evaluated on its own data
    for flag, file in written.items():
        if file and not home_path(file).parent.is_dir():
            raise UserError(f"{flag} {file}: the folder {file.parent} does not exist.")
        if file and home_path(file).is_dir():
            raise UserError(f"{flag} {file} is a folder; name a file.")
    for place, model in {"MODEL": name, "--compare": other}.items():  # both before anything is sampled
        if model:
            check_model(model, place)
    cfg = configure(args, Path(name) if name else None)
    mine = evaluate(name, cfg, world)
    result = report(mine)
    if mine.faults:
        say(f"warning: {mine.faults} calls of the reward function failed; what they were to score counts as wrong")
    title = f"{name or 'embedded model'}: {result['prompts']} prompts, {result['samples']} samples each, 95 % intervals"
    columns = {"all": result, **result.get("by_data_source", {})}
    say(f"\n{title}\n{table(columns)}")
    if other:
        theirs = evaluate(other, cfg, world)
        wins, ties = win_rate(torch.tensor(mine.rewards), torch.tensor(theirs.rewards), cfg.objective.margin)
        result["compare"] = {"other": other, "win_rate": wins, "ties": ties, **report(theirs)}
        say(f"\nwin rate against {other}: {wins:.3f} (ties count half; {ties:.3f} are ties)")
        say(table({"this": result, "other": result["compare"]}))
    if args.json and world.is_main:
        write_json(home_path(args.json), {"model": str(name or "embedded"), **result})
    if args.answers and world.is_main:
        write_json_lines(home_path(args.answers), mine.rows)
        say(f"{args.answers}: the answers to {len(mine.rows)} prompts (python -m gspo.samples shows them)")


def main() -> None:
    args = options()
    with process_group() as world:  # around all that may fail: of several ranks one says why
        run_evaluation(args, world)


def program() -> None:
    """Run `main` as the program eval.py or gspo-eval."""
    guarded(main)


if __name__ == "__main__":
    program()

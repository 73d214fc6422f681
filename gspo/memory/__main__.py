"""Print what a run will hold in each rank's memory, and which setting to change if it does not fit.

    python -m gspo.memory --config configs/standard.yaml --ranks 8 --on cuda --have 80 [section.key=value ...]
    python -m gspo.memory --fit --on cuda --have 24 model.path=...       # settings with which it fits

Of the model only config.json is read, and the names of its weights where there are any. All prompts and responses are
assumed to have the greatest length allowed. Activations are those of PyTorch's own attention on padded rows, also for a
GPU, where FlashAttention needs less.
"""

import argparse
import math
from typing import Any

import torch

from gspo.command_line import EVERY, parse_arguments
from gspo.config import Config
from gspo.errors import UserError
from gspo.memory.fit import find_fitting
from gspo.memory.footprint import GIB, Footprint, available_bytes
from gspo.memory.plan import fit_settings
from gspo.models.attention_support import check_length
from gspo.models.loading import check_weights, load_model_config
from gspo.models.model_folder import resolve_path
from gspo.models.precision import choose_precision
from gspo.read_config import STANDARD, load_config
from gspo.rollout.engines import engine_class
from gspo.rollout.tree import Tree
from gspo.system.cells import flush_left
from gspo.system.console import say
from gspo.system.help_text import HelpText
from gspo.system.language import word
from gspo.system.program import guarded


def report_text(report: Footprint, free: int | None) -> str:
    """Return the report as a table in GiB; `free`: bytes that a device has, or None if that is not known."""

    def line(indent: int, name: str, size: int, note: str = "") -> str:
        return f"{flush_left(' ' * indent + word(name), 20)}{size / GIB:9.3f}{note}"

    many, unit = (1e9, "billion") if report.parameters >= 1e8 else (1e6, "million")
    on = f"{report.precision}, {report.ranks} x {report.device}"
    lines = [f"{report.model}: {report.parameters / many:.3g} {unit} parameters, {on}; GiB on each rank"]
    lines += [line(2, name, size) for name, size in report.resident.items()]
    for phase, parts in report.phases.items():
        total = sum(report.resident.values()) + sum(parts.values())
        lines.append(line(2, f"while {phase}", total, f"  <- {word('the peak')}" if phase == report.peak_phase else ""))
        lines += [line(4, name, size) for name, size in parts.items() if size]
    if report.offloaded:
        parts = ", ".join(map(word, report.offloaded))
        lines.append(line(2, "in CPU memory", sum(report.offloaded.values()), f"  ({parts})"))
    if free is not None:
        fits = report.peak <= free
        lines.append(line(2, "available", free, f": {word('it fits' if fits else 'it does not fit')}"))
        if not fits:
            lines.append(f"change {report.cure()}")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    """Parse the command line. UserError for a number that is out of range."""
    parser = argparse.ArgumentParser(prog="python -m gspo.memory", description=__doc__, formatter_class=HelpText)
    parser.add_argument(
        "--config", default=STANDARD, help="YAML file, or a preset's name: quick, seed (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=int, help="processes of the run (default: trainer.n_gpus x nnodes, or 1)")
    parser.add_argument("--on", choices=["cpu", "cuda"], help="their devices (default: those of this machine)")
    parser.add_argument(
        "--have", type=float, metavar="GIB", help="memory of a device (default: what is free on this machine)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="see python -m gspo.parameters")
    parser.add_argument(
        "--fit", action="store_true", help="find settings that cost time, and change no result, with which it fits"
    )
    args = parse_arguments(parser, parameters=EVERY)
    if args.ranks is not None and args.ranks < 1:
        raise UserError(f"--ranks {args.ranks}: must be 1 or more.")
    if args.have is not None and not 0 < args.have < math.inf:
        raise UserError(f"--have {args.have:g}: must be a number of GiB above 0.")
    return args


def say_fitting(changes: dict[str, Any], report: Footprint, free: int | None) -> None:
    """Print the settings with which the run fits. UserError where none does, or the memory is not known."""
    if free is None:
        raise UserError("--fit: the memory of these devices is not known here; give it with --have GIB.")
    if report.peak > free:
        raise UserError(
            f"--fit: no settings that leave the results as they are fit in {free / GIB:.3g} GiB. With all of them a "
            f"rank takes {report.peak / GIB:.3g} GiB while {report.peak_phase}. Take more ranks (--ranks), or shorter "
            "prompts and responses (data.max_prompt_length, rollout.max_new_tokens)."
        )
    written = {key: str(value).lower() for key, value in changes.items()}
    say("with " + " ".join(f"{key}={value}" for key, value in written.items()) if written else "no setting is needed")


def _check(cfg: Config) -> None:
    """Raise UserError for settings of sampling with which training would not start either."""
    engine_class(cfg.rollout.engine)
    Tree.of(cfg.rollout)
    config, longest = load_model_config(cfg.model.path), cfg.rollout.max_new_tokens
    check_length(config, cfg.data.max_prompt_length + longest)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest >= positions:
        raise UserError(
            f"rollout.max_new_tokens = {longest:,}, but this model has {positions:,} positions, for a prompt and its "
            "response. Lower it."
        )


def main() -> None:
    args = _arguments()
    cfg = load_config(args.config, args.overrides, note=say)
    check_weights(cfg.model.path, required=False)
    _check(cfg)
    ranks = args.ranks or (cfg.trainer.n_gpus or 1) * (cfg.trainer.nnodes or 1)
    this_machine = "cuda" if torch.cuda.is_available() else "cpu"
    device = args.on or this_machine
    free = None
    if args.have is not None:
        free = int(args.have * GIB)
    elif device == this_machine:
        free = available_bytes(torch.device(device)) // (ranks if device == "cpu" else 1)
    if device == this_machine:
        precision, _ = choose_precision(cfg.model.precision, torch.device(device), load_model_config(cfg.model.path))
    else:
        precision = "bf16" if cfg.model.precision == "auto" else cfg.model.precision
    try:
        known = 2**62 if free is None else free
        changes, (chosen, report) = {}, fit_settings(cfg, ranks, device, precision, known)
        if args.fit and report.peak > known:
            changes, chosen, report = find_fitting(cfg, ranks, device, precision, known)
    except UserError:
        raise
    except Exception as e:  # a model class that does more than fake tensors allow
        raise UserError(
            f"the memory of model.path = {resolve_path(cfg.model.path)!r} in {precision} cannot be computed in advance "
            f"({type(e).__name__}: {' '.join(str(e).split())[:200]}). Run train.py --check to see whether it can be "
            "trained."
        ) from e
    say(report_text(report, free))
    if cfg.optim.micro_batch_tokens == "auto":
        say(f"optim.micro_batch_tokens=auto: {chosen.optim.micro_batch_tokens:,}")
    if device == "cuda" and cfg.reference.param_offload == "auto":
        say(f"reference.param_offload=auto: {str(chosen.reference.param_offload).lower()}")
    if args.fit:
        say_fitting(changes, report, free)


if __name__ == "__main__":
    guarded(main)

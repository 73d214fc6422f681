"""What a run will take of each rank's memory, worked out before it starts.

    python -m gspo.memory --config configs/standard.yaml --ranks 8 --on cuda --have 80 [section.key=value ...]

Of the model only config.json is read. Prompts and answers are taken to be as long as they may be. Activations are
those of PyTorch's own attention on padded rows, also for a GPU, where FlashAttention takes less.
"""

import argparse
import math

import torch

from gspo.errors import UserError
from gspo.memory.footprint import GIB, Footprint, footprint
from gspo.models.loading import load_model_config, resolve_path
from gspo.models.precision import choose_precision
from gspo.read_config import load_config
from gspo.rollout.kv_budget import free_bytes
from gspo.system.console import say
from gspo.system.program import guarded


def report_text(f: Footprint, free: int | None) -> str:
    """The report as text."""
    lines = [
        f"{f.model}: {f.parameters / 1e9:.3g} billion parameters, {f.precision}, {f.ranks} x {f.on}; GiB a rank",
        *(f"  {name:<18}{size / GIB:9.3f}" for name, size in f.resident.items()),
    ]
    for phase, parts in f.phases.items():
        whole = sum(f.resident.values()) + sum(parts.values())
        lines.append(f"  while {phase:<12}{whole / GIB:9.3f}{'  <- the peak' if phase == f.peak_phase else ''}")
        lines += [f"    {name:<16}{size / GIB:9.3f}" for name, size in parts.items() if size]
    if f.offloaded:
        lines.append(f"  in CPU memory     {sum(f.offloaded.values()) / GIB:9.3f}  ({', '.join(f.offloaded)})")
    if free is not None:
        fits = f.peak <= free
        lines.append(f"  there are         {free / GIB:9.3f}: {'it fits' if fits else 'it does not fit'}")
    if free is not None and f.peak > free:
        lines.append(f"turn {f.cure()}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/standard.yaml", help="YAML preset (default: %(default)s)")
    parser.add_argument("--ranks", type=int, help="processes of the run (default: trainer.n_gpus x nnodes, or 1)")
    parser.add_argument("--on", choices=["cpu", "cuda"], help="their devices (default: what is here)")
    parser.add_argument("--have", type=float, metavar="GIB", help="memory of a device (default: what is free here)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="see python -m gspo.config")
    args = parser.parse_intermixed_args()
    cfg = load_config(args.config, args.overrides)
    ranks = (cfg.trainer.n_gpus or 1) * (cfg.trainer.nnodes or 1) if args.ranks is None else args.ranks
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: must be 1 or more.")
    if args.have is not None and not 0 < args.have < math.inf:
        raise UserError(f"--have {args.have:g}: must be a number of GiB above 0.")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    on = args.on or here
    if args.have is not None:
        free = int(args.have * GIB)
    else:
        free = free_bytes(torch.device(on)) // (ranks if on == "cpu" else 1) if on == here else None
    if on == here:
        precision, _ = choose_precision(cfg.model.precision, torch.device(on), load_model_config(cfg.model.path))
    else:
        precision = "bf16" if cfg.model.precision == "auto" else cfg.model.precision
    try:
        report = footprint(cfg, ranks, on, precision, 2**62 if free is None else free)
    except UserError:
        raise
    except Exception as e:  # a class that does more than tensors without storage allow
        raise UserError(
            f"what {resolve_path(cfg.model.path)} takes in {precision} cannot be worked out ({type(e).__name__}: "
            f"{' '.join(str(e).split())[:200]}). Whether it can be trained, train.py --check says."
        ) from e
    say(report_text(report, free))


if __name__ == "__main__":
    guarded(main)

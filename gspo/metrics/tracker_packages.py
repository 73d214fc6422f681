"""Send curves to wandb, swanlab, trackio and mlflow. To add a package: a class, and its place in PACKAGES.

Each runs in a process of its own (tracker_process.py), so it may raise, hang or print as it likes. Its package is
imported when it is opened, and obeys its own environment variables (WANDB_MODE=offline, SWANLAB_MODE=local, ...). Only
numbers and settings are sent, no prompts and no responses; `reward.reward_kwargs`, which may hold secrets, stays here.
"""

import json
import math
import secrets
from pathlib import Path
from typing import Any

from gspo.config import Config, flatten, to_dict
from gspo.metrics.trackers import Tracker
from gspo.system.files import write_json


class PackageTracker(Tracker):
    """A tracker of a package that need not be installed."""

    package: str  # as it is imported and installed


class Wandb(PackageTracker):
    """A run of Weights & Biases; a run that goes on is the same one there. Files in the run's folder, `wandb/`."""

    package = "wandb"

    def __init__(self, folder: Path, cfg: Config, start_step: int):
        import wandb

        name, kept = cfg.trainer.run_name, kept_id(folder, self.package, start_step) or secrets.token_hex(8)
        self.run = wandb.init(
            project=cfg.trainer.project_name,
            name=name,
            dir=str(folder),
            config=sent_settings(cfg),
            id=kept,
            resume="allow",
        )
        keep_id(folder, self.package, kept)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class Swanlab(PackageTracker):
    """An experiment of SwanLab; a run that goes on is another one there. Files in the run's folder, `swanlab/`."""

    package = "swanlab"

    def __init__(self, folder: Path, cfg: Config, start_step: int):
        import swanlab

        self.swanlab = swanlab
        (folder / "swanlab").mkdir(exist_ok=True)
        swanlab.init(
            project=cfg.trainer.project_name,
            experiment_name=cfg.trainer.run_name,
            logdir=str(folder / "swanlab"),
            config=sent_settings(cfg),
        )

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.swanlab.log(values, step=step)

    def close(self) -> None:
        self.swanlab.finish()


class Trackio(PackageTracker):
    """A run of Trackio, which keeps a database of its own on this machine (TRACKIO_DIR)."""

    package = "trackio"

    def __init__(self, folder: Path, cfg: Config, start_step: int):
        import trackio

        self.trackio = trackio
        resume = "allow" if start_step else "never"
        name = cfg.trainer.run_name
        trackio.init(project=cfg.trainer.project_name, name=name, config=sent_settings(cfg), resume=resume)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.trackio.log(values, step=step)

    def close(self) -> None:
        self.trackio.finish()


class Mlflow(PackageTracker):
    """A run of MLflow, at MLFLOW_TRACKING_URI; a run that goes on is the same one there."""

    package = "mlflow"

    def __init__(self, folder: Path, cfg: Config, start_step: int):
        import mlflow

        self.mlflow = mlflow
        mlflow.set_experiment(cfg.trainer.project_name)
        kept = kept_id(folder, self.package, start_step)
        run = mlflow.start_run(run_id=kept, run_name=None if kept else cfg.trainer.run_name)
        keep_id(folder, self.package, run.info.run_id)
        if not kept:
            mlflow.log_params({name: str(value)[:500] for name, value in sent_settings(cfg).items()})

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics({name: x for name, x in values.items() if math.isfinite(x)}, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


PACKAGES: dict[str, type[PackageTracker]] = {kind.package: kind for kind in (Wandb, Swanlab, Trackio, Mlflow)}


def sent_settings(cfg: Config) -> dict[str, Any]:
    """Return the parameters of a run that leave this machine."""
    return {name: value for name, value in flatten(to_dict(cfg)).items() if name != "reward.reward_kwargs"}


def _ids(folder: Path) -> dict[str, str]:
    """Return {package: its number for this run}; nothing where the file is missing or damaged."""
    try:
        found = json.loads((folder / "trackers.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def kept_id(folder: Path, package: str, start_step: int) -> str | None:
    """Return the package's number for a run that goes on; None for one that begins."""
    kept = _ids(folder).get(package) if start_step else None
    return kept if isinstance(kept, str) else None


def keep_id(folder: Path, package: str, number: str) -> None:
    """Keep the package's number for this run in trackers.json."""
    if _ids(folder).get(package) != number:
        write_json(folder / "trackers.json", _ids(folder) | {package: number})

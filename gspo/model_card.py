"""Write the model card of an exported checkpoint: what it was trained from, on what and how, and what it reached."""

import json
import re
from pathlib import Path
from shlex import quote

from gspo.checkpoint import fingerprints
from gspo.checkpoint.evaluations import comparable_evaluations, figure
from gspo.checkpoint.find_runs import config_of
from gspo.config import PARAMETERS
from gspo.errors import UserError
from gspo.models.model_folder import HUB_NAME
from gspo.report.page import differing_settings
from gspo.report.read_run import read_settings, read_steps, shown
from gspo.system.console import say

# Settings of a command that gives the same results; others are of a machine, or may be secret (reward.reward_kwargs).
TOLD = re.compile(
    r"(model|data|rollout|objective|critic|selfplay|optim)\..+|reference\.refresh|eval\.n"
    r"|reward\.(path|name|range|correct_at|model_path|model_weight)|trainer\.(total_epochs|max_steps|seed)"
)
NOT_TOLD = re.compile(r"rollout\.(engine|max_slots|kv_memory_gib|weights)|optim\.(offload|micro_batch_\w+)")


def model_card(checkpoint: Path, library: str = "transformers") -> str | None:
    """Return the card of a run's checkpoint, which this library opens, as Markdown; None where it belongs to no run, or
    the run cannot be read."""
    config = config_of(checkpoint)
    if config is None or not re.fullmatch(r"step_\d+", checkpoint.resolve().name):
        return None
    run, step = config.parent, int(checkpoint.resolve().name[5:])
    try:
        settings, _, _ = read_settings(config)
        rows = read_steps(run, [])
    except UserError as e:
        say(f"note: no model card is written: {e}")
        return None
    settings = {name: _without_folders(name, text) for name, text in settings.items()}
    base = settings.get("model.path", "null")
    parts = [
        _front_matter(base, library),
        f"# {_code(run.name)}, step {step}",
        f"{_code('the embedded model' if base == 'null' else base)} after {step} steps of GSPO, Group Self-Play "
        "Preference Optimization: responses to each prompt are sampled, scored by a function and compared in pairs.",
        _facts(run, settings, rows, step),
        _evaluation(run, step),
        f"## The run again\n\n{_fenced(_command(settings))}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(base: str, library: str) -> str:
    """Return what the hub reads of a card. A folder's name is none that the hub knows."""
    of = f"base_model: {base}\n" if HUB_NAME.fullmatch(base) and not Path(base).exists() else ""
    return f"---\n{of}library_name: {library}\npipeline_tag: text-generation\ntags: [gspo]\n---"


def _facts(run: Path, settings: dict[str, str], rows: list[dict], step: int) -> str:
    """Return the table of data, reward and algorithm."""
    prints = fingerprints.read(run)
    count = prints.get("data.train_files", "").split(" ")[0]
    files = settings.get("data.train_files", "[]")
    held_out = [row["heldout/accuracy"] for row in rows if row["step"] == step and "heldout/accuracy" in row]
    reward = settings.get("reward.path", "null")
    first = rows[0]["step"]
    lines = {
        "begun from": f"a checkpoint of another run, step {first - 1}; what follows is of the steps from there on"
        if first > 1
        else "null",
        "training prompts": ("the embedded equations" if files == "[]" else files)
        + (f" ({count} rows)" if count.isdecimal() else ""),
        "reward function": "the default of gspo" if reward == "null" else reward,
        "algorithm": f"objective.algorithm={settings.get('objective.algorithm', '?')}",
        "responses a prompt": settings.get("rollout.n", "?"),
        "rounds of self-play": settings.get("selfplay.rounds", "?"),
        "learning rate": settings.get("optim.learning_rate", "?"),
        "system prompt": settings.get("data.system_prompt", "null"),
        "held-out accuracy at this step": f"{held_out[0]:.3f}" if held_out else "null",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {_code(v)} |" for k, v in lines.items() if v != "null")])


def _evaluation(run: Path, step: int) -> str:
    """Return the table before and after training; nothing where the evaluations are not of this step, or not alike."""
    reports, _ = comparable_evaluations(run, step)
    if len(reports) < 2:
        return ""
    before, after = reports.values()
    cells = [(metric, figure(before, metric), figure(after, metric)) for metric in after["interval"]]
    lines = [f"| {_code(metric)} | {a} | {b} |" for metric, a, b in cells if a and b]
    title = f"{after['prompts']} prompts that were not trained on, {after['samples']} samples each, 95 % intervals:"
    return "\n".join(["## Before and after training", "", title, "", "| | before | after |", "|---|---|---|", *lines])


def _command(settings: dict[str, str]) -> str:
    """Return the command of the run: what it set otherwise than by default, as far as it is told."""
    rows = [row for row in differing_settings([settings]) if TOLD.fullmatch(str(row[0]))]
    given = [f"{name}={value}" for name, value, _ in rows if not NOT_TOLD.fullmatch(str(name)) and value is not None]
    return " \\\n    ".join(["python train.py --config standard", *map(quote, given)])


def _without_folders(name: str, text: str) -> str:
    """Return a path, or a list of paths, without folders that say where it lay on the machine of the run."""
    if name not in PARAMETERS or not PARAMETERS[name].metadata.get("path") or text == "null":
        return text
    try:
        files = json.loads(text)
    except ValueError:
        files = text
    if isinstance(files, list):
        return json.dumps([_short(str(file)) for file in files], ensure_ascii=False)
    return _short(text)


def _short(path: str) -> str:
    parts = Path(path).parts
    return Path(path).name if path.startswith(("/", "~")) or ".." in parts else path


def _code(text: str) -> str:
    """Return a text of which Markdown and HTML read nothing, on one line."""
    plain = shown(str(text)).replace("\n", " ").replace("`", "'").replace("|", r"\|")
    return f"`{plain}`" if plain.strip() else ""


def _fenced(text: str) -> str:
    """Return a block of code whose end its own text cannot write."""
    longest = max((len(found) for found in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}bash\n{shown(text)}\n{fence}"

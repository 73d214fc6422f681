"""Which module may import which. The rules are read from the files by `ast`: imports in functions count, and those for
type checkers do as well."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

Imports = dict[str, set[str]]  # module -> dotted names that it imports
Violation = tuple[str, str]  # rule, offending pair

# Top to bottom: a room imports from itself and from those below.
ORDER = {
    "benchmarks": "timings and learning curves; nothing imports them",
    "programs": "train.py and eval.py: where the stages meet",
    "run": "gspo/*.py but the vocabulary: a run opened, its first and last words, python -m gspo.X",
    "report": "runs as one HTML page, read from their folders",
    "memory": "what a run will take, worked out before it starts",
    "metrics": "what a step and an evaluation show",
    "checkpoint": "what a run keeps on disk and goes on from",
    "algorithm": "pairs, objective, update; the models that play themselves",
    "rollout": "N responses to each prompt",
    "packing": "responses as packed sequences, their log-probs under a model",
    "reward": "responses scored, in processes of their own",
    "data": "prompts from files, in the order of training",
    "distributed": "ranks, shards, what flows between them; the only home of torch.distributed",
    "models": "a Hugging Face model opened, checked, made faster",
    "embedded": "the tasks and models that ship",
    "system": "processes, signals, files, the console",
    "vocabulary": "the configuration and its reading, types.py, errors.py: the words that all rooms share",
    "kernels": "operations on tensors; they know neither models nor training",
}
VOCABULARY = {
    "gspo",
    "gspo.command_line",
    "gspo.config",
    "gspo.config_aliases",
    "gspo.config_critic",
    "gspo.config_health",
    "gspo.config_objective",
    "gspo.config_option",
    "gspo.foreign_not_needed",
    "gspo.foreign_settings",
    "gspo.read_config",
    "gspo.read_paths",
    "gspo.read_yaml",
    "gspo.types",
    "gspo.errors",
}

# A step, stage by stage. No stage imports another; train.py hands each what those before it made.
STAGES = {
    "data": ["gspo.data"],
    "rollout": ["gspo.rollout"],
    "reward": ["gspo.reward"],
    "pairs": ["gspo.algorithm.pairs"],
    "log-probs": ["gspo.packing"],
    "objective": ["gspo.algorithm.objective"],
    "update": ["gspo.algorithm.update"],
    "log": [
        "gspo.metrics.group_rows",
        "gspo.metrics.step_metrics",
        "gspo.metrics.run_log",
        "gspo.metrics.trackers",
        "gspo.metrics.tracker_packages",
        "gspo.metrics.tracker_process",
        "gspo.metrics.tensorboard_file",
        "gspo.metrics.health",
        "gspo.metrics.progress",
    ],
}
CALLS = {  # but these, which are made of others
    ("update", "log-probs"),  # it differentiates the objective
    ("update", "objective"),  # ... of log-probs
    ("log", "objective"),  # its curves are the objective's parts
    ("log", "pairs"),  # its samples show the widest pair
}


# ---- reading ----


def files(root: Path) -> dict[str, Path]:
    """Module -> its file. `kernels/` is imported as gspo.kernels."""
    found = {}
    for path in [*root.glob("*.py"), *(p for d in ("gspo", "kernels", "benchmarks") for p in (root / d).rglob("*.py"))]:
        parts = path.relative_to(root).with_suffix("").parts
        parts = ("gspo", *parts) if parts[0] == "kernels" else parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def names(module: str, path: Path) -> Iterator[str]:
    """Dotted names that a file imports, or uses as an attribute of torch."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


def read(root: Path) -> Imports:
    """Every module with what it imports: modules of ours by their names, others by the whole dotted name."""
    found = files(root)

    def ours(name: str) -> str:
        parts = name.split(".")
        return next((m for k in range(len(parts), 0, -1) if (m := ".".join(parts[:k])) in found), name)

    return {module: {ours(name) for name in names(module, path)} - {module} for module, path in found.items()}


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def room(module: str) -> str:
    first, _, rest = module.partition(".")
    if first != "gspo":
        return "benchmarks" if first == "benchmarks" else "programs"
    if module in VOCABULARY:
        return "vocabulary"
    folder = rest.split(".")[0]
    return folder if folder in ORDER else "run"


# ---- the rules ----


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A path that ends where it begins, or nothing."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := search(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := search(node, []))), [])


def circle_of_files(imports: Imports) -> Iterator[Violation]:
    if found := cycle({module: others & imports.keys() for module, others in imports.items()}):
        yield "circle of files", " -> ".join(found)


def pairs(imports: Imports) -> Iterator[tuple[str, str]]:
    """(importer, imported) of modules of ours in different rooms."""
    for module, others in sorted(imports.items()):
        yield from ((module, other) for other in sorted(others & imports.keys()) if room(module) != room(other))


def circle_of_rooms(imports: Imports) -> Iterator[Violation]:
    graph: dict[str, set[str]] = {}
    for module, other in pairs(imports):
        graph.setdefault(room(module), set()).add(room(other))
    found = cycle(graph)
    for a, b in zip(found, found[1:], strict=False):
        module, other = next(p for p in pairs(imports) if (room(p[0]), room(p[1])) == (a, b))
        yield "circle of folders", f"{' -> '.join(found)}: {module} imports {other}"


def upward(imports: Imports) -> Iterator[Violation]:
    height = list(ORDER)
    for module, other in pairs(imports):
        if height.index(room(module)) > height.index(room(other)):
            yield "upward", f"{module} imports {other}: {room(other)} is above {room(module)}"


def stage_to_stage(imports: Imports) -> Iterator[Violation]:
    def stage(module: str) -> str | None:
        return next((name for name, parts in STAGES.items() if any(is_in(module, part) for part in parts)), None)

    for module, others in sorted(imports.items()):
        for other in sorted(others):
            a, b = stage(module), stage(other)
            if a and b and a != b and (a, b) not in CALLS:
                yield "stage", f"{module} imports {other}: {a} knows {b}"


def torch_distributed(imports: Imports) -> Iterator[Violation]:
    for module, others in sorted(imports.items()):
        used = sorted(name for name in others if is_in(name, "torch.distributed"))
        if used and not is_in(module, "gspo.distributed"):
            yield "torch.distributed", f"{module} imports {used[0]}"


def kernels_know_nothing(imports: Imports) -> Iterator[Violation]:
    for module, others in sorted(imports.items()):
        for other in sorted(others):
            strange = is_in(other, "transformers") or (is_in(other, "gspo") and not is_in(other, "gspo.kernels"))
            if is_in(module, "gspo.kernels") and strange:
                yield "kernel", f"{module} imports {other}"


RULES = (circle_of_files, circle_of_rooms, upward, stage_to_stage, torch_distributed, kernels_know_nothing)


def violations(root: Path) -> list[Violation]:
    imports = read(root)
    return [found for rule in RULES for found in rule(imports)]


# ---- this tree ----


def test_imports_keep_to_the_rules():
    assert violations(ROOT) == []


def test_every_folder_is_a_room_and_says_what_for():
    folders = [p for p in (ROOT / "gspo").iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert {p.name for p in folders} <= ORDER.keys()
    for folder in folders:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder
    assert not (ROOT / "kernels" / "__init__.py").exists(), "then `import kernels` would be ours"


def test_every_import_is_seen(tmp_path):
    (tmp_path / "gspo" / "data").mkdir(parents=True)
    (tmp_path / "gspo" / "data" / "a.py").write_text(
        "import importlib\nfrom typing import TYPE_CHECKING\nimport torch\nfrom gspo.data import b\nfrom . import c\n"
        "if TYPE_CHECKING:\n    from gspo.errors import UserError\n"
        "def f():\n    from gspo.types import Prompt\n    importlib.import_module('gspo.run')\n"
        "    return torch.distributed.is_initialized()\n"
    )
    for name in ("data/b", "data/c", "errors", "types", "run"):
        (tmp_path / "gspo" / f"{name}.py").write_text("")
    ours = {"gspo.data.b", "gspo.data.c", "gspo.errors", "gspo.types", "gspo.run"}
    assert read(tmp_path)["gspo.data.a"] == ours | {"importlib", "typing.TYPE_CHECKING", "torch", "torch.distributed"}


# ---- trees with one import too many ----

WRONG = {
    "circle of files": ("gspo/data/messages.py", "from gspo.data.encoding import Encoder", "gspo.data.messages"),
    "circle of folders": (
        "gspo/models/precision.py",
        "def late():\n    from gspo.distributed.world import World",
        "gspo.models.precision imports gspo.distributed.world",
    ),
    "upward": (
        "gspo/system/files.py",
        "if TYPE_CHECKING:\n    from gspo.embedded import DATA_DIR",
        "gspo.system.files imports gspo.embedded",
    ),
    "stage": (
        "gspo/rollout/paged_engine.py",
        "from gspo.reward import scorer",
        "gspo.rollout.paged_engine imports gspo.reward.scorer",
    ),
    "torch.distributed": (
        "gspo/packing/logprobs.py",
        "def ranks():\n    return torch.distributed.get_world_size()",
        "gspo.packing.logprobs imports torch.distributed",
    ),
    "kernel": (
        "kernels/plain_logprob.py",
        "from transformers import PreTrainedModel",
        "gspo.kernels.plain_logprob imports transformers",
    ),
    "kernel too": (
        "kernels/packed_attention_cpu.py",
        "from gspo.types import Prompt",
        "gspo.kernels.packed_attention_cpu imports gspo.types",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_import_too_many_is_reported(name, tmp_path):
    for path in files(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    file, line, said = WRONG[name]
    with (tmp_path / file).open("a", encoding="utf-8") as f:
        f.write(f"\n\n{line}\n")
    found = violations(tmp_path)
    rule = name.removesuffix(" too")
    assert any(r == rule and said in pair for r, pair in found), found
    others = {"circle of folders": {"upward"}, "upward": {"circle of folders"}, "kernel too": {"upward"}}.get(
        name, set()
    )
    assert {r for r, _ in found} == {rule} | others

"""Check what `pip install` would install: every folder and file that a run needs, and our kernels as `gspo.kernels`."""

import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from repository import ROOT

tomllib = pytest.importorskip("tomllib")  # Python 3.11
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_every_package_is_listed():
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "gspo").rglob("*.py")} - {ROOT}
    assert {*SETUPTOOLS["packages"]} == {".".join(folder.parts) for folder in folders} | {*SETUPTOOLS["package-dir"]}


def test_every_file_that_is_not_python_is_listed():
    folders = {
        "gspo.embedded": ROOT / "gspo" / "embedded",
        "gspo.configs": ROOT / "configs",
        "gspo.kernels": ROOT / "kernels",
        "gspo.report": ROOT / "gspo" / "report",
        "gspo.system": ROOT / "gspo" / "system",
    }
    assert {f"gspo.{folder}": folder for folder in ("configs", "kernels")} == SETUPTOOLS["package-dir"]
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = folders.pop(package)
        installed = {path for pattern in patterns for path in folder.glob(pattern)}
        others = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".md")}
        assert others <= installed
    assert not folders


def test_the_commands_are_functions():
    for target in PROJECT["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def install(folder):
    """Copy what `pip install` copies."""
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gspo", folder / "gspo", ignore=without_caches)
    for name, source in SETUPTOOLS["package-dir"].items():
        shutil.copytree(ROOT / source, folder / name.replace(".", "/"), ignore=without_caches)
    for name in SETUPTOOLS["py-modules"]:
        shutil.copy(ROOT / f"{name}.py", folder)


def test_installed_beside_the_other_package_kernels_ours_is_imported(tmp_path):
    install(tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    code = "import gspo.kernels.ops as ops, kernels; print(ops.__file__, kernels.theirs)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "gspo" / "kernels" / "ops.py"), "True"], done.stderr[-2000:]


@pytest.mark.slow
def test_installed_it_finds_its_presets(tmp_path):
    install(tmp_path / "site")
    code = "import sys, train; sys.argv = ['gspo-train', '--check']; train.program()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "256 x 8" in done.stdout, done.stderr[-2000:]


def test_an_image_gets_every_file_of_the_repository_and_nothing_that_runs_left_there():
    ignored = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    top = {name.partition("/")[0] for name in tracked}
    assert not top & {*ignored} and {".venv", "outputs", "data", "models", ".git"} <= {*ignored}
    copied = re.findall(r"^COPY (\S+) ", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert copied == ["requirements.txt", "."] and (ROOT / copied[0]).exists()

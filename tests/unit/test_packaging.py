"""Check what `pip install` would install: every folder and file that a run needs, and our kernels as `gspo.kernels`."""

import importlib
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
    assert {*SETUPTOOLS["packages"]} == {".".join(folder.parts) for folder in folders} | {"gspo.kernels"}


def test_every_file_that_is_not_python_is_listed():
    folders = {"gspo.kernels": ROOT / "kernels", "gspo.embedded": ROOT / "gspo" / "embedded"}
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


def test_installed_beside_the_other_package_kernels_ours_is_imported(tmp_path):
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gspo", tmp_path / "gspo", ignore=without_caches)
    shutil.copytree(ROOT / "kernels", tmp_path / "gspo" / "kernels", ignore=without_caches)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    code = "import gspo.kernels.ops as ops, kernels; print(ops.__file__, kernels.theirs)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "gspo" / "kernels" / "ops.py"), "True"], done.stderr[-2000:]

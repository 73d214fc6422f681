"""notebooks/quickstart.ipynb runs from its first cell to its last, and the model in it learns."""

import re

import nbformat
import pytest
from repository import ROOT

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def text_of(notebook):
    """All that the cells printed."""
    return "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))


def test_the_notebook_is_kept_with_its_outputs_and_without_a_path_of_its_writer():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in ran)
    assert not [out for cell in ran for out in cell.outputs if out.output_type == "error"]
    assert "/home/" not in str(notebook) and "/root/" not in str(notebook) and "/tmp/" not in str(notebook)


@pytest.mark.slow
def test_the_notebook_runs_and_its_model_learns(run_program, tmp_path):
    """In a process of its own, which can be ended whatever its kernel waits for."""
    done = run_program("tests/programs/run_notebook.py", NOTEBOOK, tmp_path / "ran.ipynb", timeout=850)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = text_of(nbformat.read(tmp_path / "ran.ipynb", as_version=4))
    before, after = (float(x) for x in re.search(r"pass@1 +(0\.\d+) \[.*?\] +(0\.\d+) ", printed).groups())
    assert before < 0.5 and after > 0.7

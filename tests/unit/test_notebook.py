"""notebooks/quickstart.ipynb runs from its first cell to its last, and the model in it learns."""

import re

import nbformat
import pytest
from nbclient import NotebookClient
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
def test_the_notebook_runs_and_its_model_learns():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    before, after = (float(x) for x in re.search(r"pass@1 +(0\.\d+) \[.*?\] +(0\.\d+) ", text_of(notebook)).groups())
    assert before < 0.5 and after > 0.7

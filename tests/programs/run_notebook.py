"""Run a notebook from first to last cell: run_notebook.py NOTEBOOK TO. Written is a copy with what it printed."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

source, to = map(Path, sys.argv[1:])
notebook = nbformat.read(source, as_version=4)
NotebookClient(notebook, timeout=800, resources={"metadata": {"path": str(source.parent)}}).execute()
nbformat.write(notebook, to)

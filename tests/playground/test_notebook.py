"""The notebook runs from its first cell to its last, and is shown with what it gave."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "playground/one_image.ipynb"


def test_the_notebook_runs_where_jupyter_would_start_it():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3
    assert notebook.cells[-1].outputs[-1].text.strip()


def test_it_is_committed_with_its_pictures_and_without_paths_of_a_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.outputs for cell in notebook.cells[2:] if cell.cell_type == "code")  # the first finds the folder
    text = NOTEBOOK.read_text()
    assert "site-packages" not in text
    assert NOTEBOOK.stat().st_size < 200_000

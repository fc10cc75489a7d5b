"""The notebooks run from the first cell to the last, and have their plots."""

from __future__ import annotations

from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat", reason="needs nbformat")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
pytest.importorskip("ipykernel", reason="needs ipykernel")
pytest.importorskip("matplotlib", reason="needs matplotlib")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


def plots(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def test_there_are_two():
    assert {path.stem for path in NOTEBOOKS} == {"quickstart", "training_sweep"}


@pytest.mark.xdist_group("real model")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path):
    """They compare with PEFT themselves, and fail if they differ."""
    notebook = nbformat.read(path, as_version=4)
    assert len(plots(notebook)) == 1, "the outputs are part of the file, for readers who don't run it"
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert len(plots(notebook)) == 1

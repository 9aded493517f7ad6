"""Every notebook runs from top to bottom, at test size."""

import pathlib

import nbclient
import nbformat
import pytest
from small import SMALL, make_inputs

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "colab").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path):
    make_inputs(tmp_path)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    parameters = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    settings = {**SMALL, "base": str(tmp_path / "base.safetensors"), "steps": 2}
    parameters[0].source += f"\nworkdir = {str(tmp_path / 'run')!r}\nsettings = {settings!r}"
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    tables = [
        output["data"]["text/markdown"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text/markdown" in output.get("data", {})
    ]
    assert any("demonstrator" in table and "executor" in table for table in tables)
    assert (tmp_path / "run" / "report.html").exists()

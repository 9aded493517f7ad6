"""Notebooks run from top to bottom, at test size; that of the quickstart in `test_quickstart`, beside such a run."""

import json
import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "colab"
TINY_WAN = {
    "model.size": (64, 64), "model.depth": 1, "sampler.steps": 2, "rollout.tasks": 1, "rollout.group": 2,
    "objective.updates": 1, "objective.minibatches": 1, "objective.draws": 1, "optimizer.learning_rate": ((0, 0.1),),
}  # fmt: skip
TINY_LTX2 = TINY_WAN | {"sampler.explicit": (1.0, 0.6)}


def execute(name, folder, **parameters):
    """Cells of a notebook that ran in `folder`, with other values of its parameters."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook.cells


def shown(cells, kind):
    """What the cells display, of one type."""
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return [data[kind] for data in outputs if kind in data]


def test_every_notebook_is_run():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {"ltx2", "quickstart", "wan22_5b"}


@pytest.mark.parametrize("name, settings", [("wan22_5b", TINY_WAN), ("ltx2", TINY_LTX2)])
def test_a_model_runs_from_published_weights_to_clips_of_a_lora_file(tmp_path, name, settings):
    cells = execute(name, tmp_path, workdir="run", steps=2, settings=settings)
    before, after = (page for page in shown(cells, "text/html") if "<video" in page)
    assert [before.count("data:video/mp4;base64,"), after.count("data:video/mp4;base64,")] == [2, 3]
    clips = {json.loads(path.read_text())["role"]: path for path in (tmp_path / "run" / "tiny").glob("clips*/*.json")}
    frames = {role: path.with_suffix(".mp4").read_bytes() for role, path in clips.items()}
    assert len(set(frames.values())) == 3 and frames.keys() == {"base", "demonstrator", "executor"}
    assert (tmp_path / "run" / "tiny" / "executor-comfy-2.safetensors").exists()

"""The main job at test size: what it writes, that it goes on after an interruption, that the seed matters."""

import html
import json
import shutil

import pytest
from small import SMALL, make_inputs

from tests.test_notebooks import execute, shown
from world_distill.errors import UserError
from world_distill.programs import quickstart, train
from world_distill.settings.loading import load_config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return str(folder / "base.safetensors")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The folder of a run that nothing interrupted, and its results."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, quickstart.quickstart(config_of(base), folder)


def config_of(base, **overrides):
    return load_config("sandbox", {**SMALL, "base": base, "steps": 2, **overrides})


def test_quickstart_writes_results_and_report_and_continues(base, whole, monkeypatch):
    folder, results = whole
    assert results == json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["base", "demonstrator", "executor"]
    for row in results["rows"]:
        assert row["n"] == 4
        assert set(row["ci95"]) == {"task", "agent", "consistency", "average", "all"}
    page = (folder / "report.html").read_text()
    assert "<html" in page and "emonstrator" in page

    # Done is done: nothing is trained or sampled again.
    def again(*args, **kwargs):
        raise AssertionError("this was done already")

    monkeypatch.setattr(train.Collector, "begin", again)
    monkeypatch.setattr(quickstart, "evaluate_roles", again)
    assert quickstart.quickstart(config_of(base), folder)["rows"] == results["rows"]


@pytest.mark.once
def test_the_notebook_goes_on_with_a_run_that_was_trained(base, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder, ignore=shutil.ignore_patterns("results.json", "report.html", "clips"))
    cells = execute("quickstart", tmp_path, workdir=str(folder), settings={**SMALL, "base": base, "steps": 2})
    assert any("Demonstrator" in table and "Executor" in table for table in shown(cells, "text/markdown"))
    assert shown(cells, "image/gif")
    [page] = [page for page in shown(cells, "text/html") if "<iframe" in page]
    assert html.escape((folder / "report.html").read_text()) in page
    assert json.loads((folder / "results.json").read_text())["rows"] == whole[1]["rows"]


@pytest.mark.once
def test_interrupted_after_training_it_only_scores(base, whole, tmp_path, monkeypatch):
    config = config_of(base)

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "score", dies)
        with pytest.raises(KeyboardInterrupt):
            quickstart.quickstart(config, tmp_path)
    assert quickstart.quickstart(config, tmp_path)["rows"] == whole[1]["rows"]


def test_the_seed_changes_scenes_and_a_used_folder_is_refused(base, whole, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="seed"):
        quickstart.quickstart(config_of(base, seed=1), whole[0])

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", dies)  # scenes are made before
    with pytest.raises(KeyboardInterrupt):
        quickstart.quickstart(config_of(base, seed=1), tmp_path)
    scenes = [{p.read_bytes() for p in (run / "data" / "scenes").rglob("*.png")} for run in (whole[0], tmp_path)]
    assert scenes[0] and scenes[1] and not scenes[0] & scenes[1]

"""The main job at test size: what it writes, that it goes on after an interruption, that the seed matters."""

import json

import pytest
from small import SMALL, make_inputs

from world_distill import quickstart, train
from world_distill.config import UserError, load_config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return str(folder / "base.safetensors")


def config_of(base, **overrides):
    return load_config("sandbox", {**SMALL, "base": base, "steps": 2, **overrides})


def test_quickstart_writes_results_and_report_and_continues(base, tmp_path, monkeypatch):
    config = config_of(base)
    results = quickstart.quickstart(config, tmp_path)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["base", "demonstrator", "executor"]
    for row in results["rows"]:
        assert row["n"] == 4
        assert set(row["ci95"]) == {"task", "agent", "consistency", "average", "all"}
    page = (tmp_path / "report.html").read_text()
    assert "<html" in page and "emonstrator" in page

    # Done is done: nothing is trained or sampled again.
    def again(*args, **kwargs):
        raise AssertionError("this was done already")

    monkeypatch.setattr(train.Collector, "__call__", again)
    monkeypatch.setattr(quickstart, "evaluate_roles", again)
    assert quickstart.quickstart(config, tmp_path)["rows"] == results["rows"]


def test_interrupted_after_training_it_only_scores(base, tmp_path, monkeypatch):
    config = config_of(base)
    whole = quickstart.quickstart(config, tmp_path / "whole")

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "score", dies)
        with pytest.raises(KeyboardInterrupt):
            quickstart.quickstart(config, tmp_path / "parts")
    assert quickstart.quickstart(config, tmp_path / "parts")["rows"] == whole["rows"]


def test_the_seed_changes_scenes_and_a_used_folder_is_refused(base, tmp_path):
    quickstart.quickstart(config_of(base), tmp_path / "a")
    with pytest.raises(UserError, match="seed"):
        quickstart.quickstart(config_of(base, seed=1), tmp_path / "a")
    quickstart.quickstart(config_of(base, seed=1), tmp_path / "b")
    scenes = [{p.read_bytes() for p in (tmp_path / run / "data" / "scenes").rglob("*.png")} for run in ("a", "b")]
    assert scenes[0] and scenes[1] and not scenes[0] & scenes[1]

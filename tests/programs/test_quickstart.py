"""The main job at test size: what it writes, that it goes on after an interruption, that the seed matters."""

import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from small import HASH, SMALL, make_inputs

from tests.test_notebooks import execute, shown
from tests.test_readme import README, VALIDATION, own_pictures
from world_distill import cli
from world_distill.cli import arguments, command
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


DEVICES = """
import pathlib, sys
from world_distill import build
from world_distill.programs import prepare
from world_distill.settings.loading import load_config
config = load_config("sandbox")
prepare.make_records(config, pathlib.Path(sys.argv[1]))
print(config.host_devices, build.start_devices(config).size)
"""


@pytest.mark.once
def test_a_run_that_goes_on_has_the_devices_that_it_began_with(whole):
    """Its records are there; sums over the batch are grouped by device."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    command = [sys.executable, "-c", DEVICES, str(whole[0] / "data")]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "1"], done.stderr


def test_a_base_that_is_not_there_leaves_the_folder_free(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*nowhere\.safetensors: --config\.base names"):
        quickstart.quickstart(config_of(str(tmp_path / "nowhere.safetensors")), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


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


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder as README describes it, beside which its commands are called."""
    monkeypatch.chdir(tmp_path)
    (row,) = re.findall(r"```json\n(.+)\n```", README)
    names = ["kitchen.jpg", *(f"{i}.jpg" for i in range(7))]
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for name in names:  # of the size of the sandbox's scenes
        Image.fromarray(rng.integers(0, 255, (30, 30, 3), np.uint8)).save(tmp_path / "pictures" / name)
    rows = [json.loads(row) | {"image": name} for name in names]
    (tmp_path / "pictures" / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.once
def test_readmes_own_pictures_become_records_an_executor_and_clips(base, whole, pictures, capsys):
    """Its commands in their order, with the small model's settings behind them, whose programs are compiled already."""
    changed = {**SMALL, "base": base, "steps": 2, "judge.factory": HASH}
    small = ["--config", "sandbox", *(f"--config.{key}={value}" for key, value in changed.items())]
    said = {}
    for words in own_pictures():
        words = [word for word in words if "text_encoder" not in word]  # the sandbox has one
        words += small if "--config" in words else ["--limit", "1"] if words[0] == "generate" else []
        words += [VALIDATION, "0.5"] if VALIDATION in words else []  # 0.02 of 8 pictures is none
        name = "dry run" if "--dry-run" in words else words[0]
        code = cli.main(words)
        said[name], err = capsys.readouterr()
        assert code == (2 if name == "export" else 0), (words, err)  # no other program reads the sandbox's model
        if name == "dry run":
            assert not (pictures / "runs").exists()
    assert "memory: " in said["dry run"] and "2 steps of 8 rollouts" in said["dry run"]
    assert "trained an Executor to step 2: runs/mine\nnext: world-distill evaluate" in said["train"]
    assert json.loads((pictures / "runs/mine/config.json").read_text())["data"] == "data"
    roles = {json.loads(path.read_text())["role"] for path in (pictures / "clips").glob("*.json")}
    assert roles == {"executor", "demonstrator"}
    for call in re.findall(r"(?:next|  or): world-distill (.+)", "\n".join(said.values())):
        verb, *flags = shlex.split(call)  # each is one that the verb takes
        command.parser_of(verb)[0].parse(arguments.take_overrides(flags)[0], lambda args: {})


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

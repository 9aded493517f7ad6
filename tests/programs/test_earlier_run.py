"""A run folder that an earlier version made resumes, evaluates, reports and exports.

`tests/earlier/run.tar.gz` is the folder of a run of `wan22_5b:debug` after 2 steps, before the package was divided into
`training`, `storage` and so on: its config names parts by their old addresses. The LoRA files are what that version
exported after 2 steps, and after 4.
"""

import json
import pathlib
import tarfile

import numpy as np
import pytest
import safetensors.numpy

from world_distill import cli
from world_distill.programs import train
from world_distill.settings.loading import load_config, override
from world_distill.storage.metric_log import read_log
from world_distill.training import run_folder

EARLIER = pathlib.Path(__file__).parents[1] / "earlier"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("earlier")
    with tarfile.open(EARLIER / "run.tar.gz") as archive:
        archive.extractall(place, filter="data")
    return place / "run"


def exported(folder, out):
    assert cli.main(["export", "--workdir", str(folder), "--format", "diffusers", "--out", str(out)]) == 0
    return safetensors.numpy.load_file(out)


def assert_close(found, expected, atol):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=atol, err_msg=name)


def test_old_addresses_are_read_as_todays(folder):
    written = json.loads((folder / "config.json").read_text())
    assert written["judge"]["factory"] == "world_distill.judges.brightness:Brightness"
    config = run_folder.read_config(folder)
    assert config.judge.factory == "world_distill.judges:Brightness"
    assert config.annotator.factory == "world_distill.sandbox:make_oracle"
    given = load_config("wan22_5b:debug", {"judge.factory": "world_distill.judges.server:ServerJudge"})
    assert given.judge.factory == "world_distill.judges:ServerJudge"


def test_it_evaluates_and_reports(folder, capsys):
    assert cli.main(["evaluate", "--workdir", str(folder), "--roles", "executor", "--limit", "2"]) == 0
    rows = json.loads((folder / "evaluation.json").read_text())["rows"]
    assert [(row["name"], row["n"]) for row in rows] == [("executor", 2)]
    assert cli.main(["report", "--workdir", str(folder)]) == 0
    assert "judge.factory = " in (folder / "report.html").read_text()


def test_it_exports_and_goes_on_as_it_would_have(folder, tmp_path):
    expected = {step: safetensors.numpy.load_file(EARLIER / f"executor_{step}.safetensors") for step in (2, 4)}
    assert_close(exported(folder, tmp_path / "2.safetensors"), expected[2], atol=0)
    config = run_folder.read_config(folder)
    override(config, {"steps": 4})
    train.train(config, folder)
    assert [line["step"] for line in read_log(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    moved = max(np.abs(expected[4][name] - expected[2][name]).max() for name in expected[2])
    assert moved > 1e-3
    assert_close(exported(folder, tmp_path / "4.safetensors"), expected[4], atol=1e-5)

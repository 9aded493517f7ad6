"""LTX-2's debug model in two processes: they encode and train as one does."""

import json
import textwrap

import jax
import jobs
import numpy as np
import pytest
from small import PATTERN, check_advantages

from tests.programs.test_ltx2_run import config_of
from tests.runs import final_states
from world_distill.data.records.reader import RecordReader
from world_distill.programs import prepare, train

pytestmark = pytest.mark.once

# Processes may round a pixel in another way, and Adam must not blow up the sign of a vanishing gradient.
CHANGES = {"judge.factory": PATTERN, "optimizer.eps": 1e-3, "model.depth": 1}
START = f"""
    import pathlib, sys
    sys.path[:0] = [{str(jobs.ROOT / "tests")!r}, {str(jobs.ROOT)!r}]
    from tests.programs.test_ltx2_run import config_of
    from world_distill import cli
    from world_distill.cli import arguments
    records, workdir = sys.argv[1:]
    config = config_of(**{CHANGES!r}, data=records)
    arguments.config_from = lambda args: config
"""
TRAIN = (
    START
    + """
    sys.exit(cli.main(["train", "--config", "ltx2:debug", "--workdir", workdir]))
"""
)
ENCODE = (
    START
    + """
    sys.exit(cli.main(["encode", "--config", "ltx2:debug", "--records", records, "--shard", "SHARD"]))
"""
)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ltx2") / "data"
    prepare.make_records(config_of(), folder)
    return folder


def scripts(*codes):
    return [textwrap.dedent(code) for code in codes]


def test_two_processes_encode_as_one(records, tmp_path):
    for path in records.glob("train_annotated*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    made = [
        jobs.start_scripts(scripts(ENCODE.replace("SHARD", f"{i}/2")), str(tmp_path), "unused")[0] for i in range(2)
    ]
    codes, said = jobs.finish(made)
    assert codes == [0, 0], said
    one, two = (list(RecordReader(folder, "train")) for folder in (records, tmp_path))
    assert len(list(tmp_path.glob("train-*.arrayrecord"))) == 2 and len(two) == len(one)
    for a, b in zip(one, two, strict=True):
        assert (a.id, a.task, a.image_png) == (b.id, b.task, b.image_png)
        np.testing.assert_allclose(b.scene["video"], a.scene["video"], atol=1e-5)
        for role in ("task_states", "solution_states"):
            jax.tree.map(np.testing.assert_array_equal, getattr(b, role), getattr(a, role))


def test_two_processes_train_as_one(records, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    codes, said = jobs.finish(jobs.start_scripts(scripts(TRAIN, TRAIN), str(records), str(together)))
    assert codes == [0, 0], said
    config = config_of(**CHANGES, data=str(records))
    train.train(config, alone)
    for folder in (alone, together):
        check_advantages(config, folder)
    (one, data), (other, other_data) = final_states(config, alone, together)
    assert data == other_data
    moved = [np.abs(x).max() for x in jax.tree.leaves(one.lora)]
    assert min(moved) > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one.lora, other.lora)
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (alone, together)
    ]
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys() and a["reward/total"] == pytest.approx(b["reward/total"], abs=1e-3)

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
from world_distill import build
from world_distill.data.records.reader import RecordReader
from world_distill.devices.sharding import make_mesh
from world_distill.programs import prepare, train
from world_distill.storage import array_store
from world_distill.weights import base_model

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
    config.base = workdir
    sys.exit(cli.main(["encode", "--config", "ltx2:debug", "--records", records, FLAGS]))
"""
)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ltx2") / "data"
    prepare.make_records(config_of(), folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The base of the debug model as `convert` writes one."""
    config, mesh = config_of(**CHANGES), make_mesh()
    family = build.make_family(config, mesh)
    writer = array_store.Writer(tmp_path_factory.mktemp("ltx2") / "base", {"family": family.name})
    for name, x in array_store.by_name(base_model.load_base(family, config, mesh)).items():
        writer.add(name, np.asarray(x))
    writer.finish()
    return writer.path


def scripts(*codes):
    return [textwrap.dedent(code) for code in codes]


@pytest.mark.parametrize("job", [False, True], ids=["shard", "job"])
def test_two_processes_encode_as_one(records, checkpoint, tmp_path, job):
    """On machines of their own, each told its shard, or in one job, which shares three shards out."""
    base = str(checkpoint) if job else config_of().base
    for path in records.glob("train_annotated*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    flags = ['"--shards", "3"'] * 2 if job else [f'"--shard", "{i}/2"' for i in range(2)]
    codes = scripts(*(ENCODE.replace("FLAGS", words) for words in flags))
    groups = [codes] if job else [[code] for code in codes]
    made = [process for group in groups for process in jobs.start_scripts(group, str(tmp_path), base)]
    codes, said = jobs.finish(made)
    assert codes == [0, 0], said
    one, two = (list(RecordReader(folder, "train")) for folder in (records, tmp_path))
    assert len(list(tmp_path.glob("train-*.arrayrecord"))) == (3 if job else 2) and len(two) == len(one)
    if job:  # the first process speaks for all
        assert f"encoded {len(one)} records; {tmp_path}/train is complete with {len(one)} records" in said[0]
        assert "complete" not in said[1]
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

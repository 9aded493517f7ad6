"""Jobs of several processes: what they agree on, and that they train as one process does."""

import json
import random
import re
import shutil
import signal
import time

import jax
import jobs
import numpy as np
import pytest
from small import PATTERN, VARIANTS, check_advantages, make_inputs, small_config

from tests.effort import KILLS
from tests.runs import assert_same, final_states
from world_distill.data.records.batches import task_batches
from world_distill.data.records.reader import RecordReader
from world_distill.devices import hosts
from world_distill.devices.sharding import make_mesh, rows_or_whole
from world_distill.errors import UserError
from world_distill.programs import train

STEPS = 6
SIZES = {"model.depth": 1, "sampler.steps": 2, "objective.updates": 1, "scenes.validation": 4, "steps": STEPS}
EVALUATION = {"evaluate_every": 2, "evaluate_batch": 4, "held_out.factory": "world_distill.sandbox:make_oracle"}
KEPT = {"save_every": 1, "keep": STEPS}
RUN = VARIANTS["awm"] | KEPT | SIZES | EVALUATION | {"rollout.staleness": 1, "host_devices": 4}
RUN |= {"judge.factory": PATTERN}  # processes may round a pixel in another way


def test_variables_come_together():
    with pytest.raises(UserError, match="not JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        hosts.start({"JAX_COORDINATOR_ADDRESS": "localhost:1"})
    with pytest.raises(UserError, match="JAX_PROCESS_ID = 2 of JAX_NUM_PROCESSES = 2"):
        hosts.start(dict(zip(hosts.VARIABLES, ("localhost:1", "2", "2"), strict=True)))
    hosts.start(dict(zip(hosts.VARIABLES, ("localhost:1", "1", "0"), strict=True)))  # alone: nothing to join
    assert hosts.is_main() and not jax.distributed.is_initialized()


JOIN = (
    "import sys, time; from world_distill import cli; from world_distill.devices import hosts; "
    "hosts.{} = {}; hosts.start(); "
)


def test_a_process_ends_well_while_it_watches_the_others():
    """An interpreter that ends within a call of JAX's client is aborted (-6)."""
    codes, said = jobs.finish(jobs.start_scripts([JOIN.format("_BEATS_IN_SILENCE", 1e9) + "time.sleep(1)"] * 2))
    assert codes == [0, 0], said


def test_others_go_on_without_a_process_that_is_done_but_not_without_one_that_gave_up():
    join = JOIN.format("SILENCE_SECONDS", 2)
    waits, fails = join + "time.sleep(6)", join + "sys.exit(cli.main(['inspect', '--records', 'nowhere']))"
    codes, said = jobs.finish(jobs.start_scripts([waits, join]))
    assert codes == [0, 0], said
    codes, said = jobs.finish(jobs.start_scripts([waits, fails]))
    assert codes[0] == hosts.LOST and "process 1 of this job has died" in said[0], said
    assert codes[1] and "nowhere" in said[1], said


@pytest.mark.parametrize(
    "environment, peers",
    [
        ({}, False), ({"TPU_WORKER_HOSTNAMES": "localhost"}, False), ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True), ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, False),
        ({"SLURM_STEP_NODELIST": "n0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_STEP_NODELIST": "n[0-1]", "SLURM_NTASKS": "4"}, True),
    ],
)  # fmt: skip
def test_platforms_are_known(environment, peers, monkeypatch):
    monkeypatch.setattr(hosts, "_tpu_vm_hosts", lambda: "")
    assert hosts._has_peers(environment) == peers
    # A TPU VM of a pod slice says so to whoever asks its metadata server.
    monkeypatch.setattr(hosts, "_tpu_vm_hosts", lambda: "unknown:8470:10.0.0.2,unknown:8470:10.0.0.3")
    assert hosts._has_peers(environment) and hosts._has_peers(environment | {"JAX_PLATFORMS": "cpu"}) == peers


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder, **SIZES)
    return folder


# Says how many clips each process's benchmark is shown, how many questions its held-out judge is asked, and how many
# bytes of records it reads.
COUNTING = """
from world_distill import build
from world_distill.data.records.reader import RecordReader
read = RecordReader.__getitem__
def reading(reader, index):
    record = read(reader, index)
    print("read", reader.index_path.stem, len(record.to_bytes()), flush=True)
    return record
RecordReader.__getitem__ = reading
make = build.make
def counting(config, section):
    made, name = make(config, section), {"benchmark": "check", "held_out": "ask"}.get(section)
    if name:
        function = getattr(made, name)
        setattr(made, name, lambda first, *rest: [print(section, len(first), flush=True), function(first, *rest)][1])
    return made
build.make = counting
"""


@pytest.fixture(scope="module")
def two(inputs, tmp_path_factory):
    """(folder, words of each process) of a job of two that nothing befalls."""
    folder = tmp_path_factory.mktemp("two")
    codes, said = jobs.finish(jobs.start(inputs, folder, RUN, RUN, before=COUNTING))
    assert codes == [0, 0], said
    return folder, said


def test_two_processes_train_as_one(inputs, two, tmp_path):
    config = small_config(inputs, **RUN)
    train.train(config, tmp_path)
    check_advantages(config, tmp_path)
    folder, said = two
    check_advantages(config, folder)
    (one, data), (other, other_data) = final_states(config, tmp_path, folder)
    assert data == other_data
    for a, b in zip(jax.tree.leaves(one.lora), jax.tree.leaves(other.lora), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (tmp_path, folder)
    ]
    for a, b in zip(*lines, strict=True):  # judged in two places, each clip once
        assert a.keys() == b.keys()
        same = [name for name in a if name.startswith(("validation/", "held_out/")) or name == "reward/total"]
        one, other = ([np.nan if line[name] is None else line[name] for name in same] for line in (a, b))
        np.testing.assert_allclose(one, other, atol=1e-3)
    assert len(list(folder.glob("judgments-*.sqlite"))) == 2
    assert "step 2/" in said[0] and "step 2/" not in said[1]
    for text in said:  # of four clips, three questions about each, at every evaluation
        assert re.findall(r"benchmark (\d+)", text) == ["2"] * (STEPS // 2)
        assert re.findall(r"held_out (\d+)", text) == ["6"] * (STEPS // 2)


# Makes the Demonstrator's clips, before it trains on them.
DEMONSTRATE = """
from world_distill.data.records.reader import RecordReader
from world_distill.programs.demonstrate import demonstrate
given = small_config(inputs, **{changes!r})
demonstrate(given, RecordReader(given.data, "train"), pathlib.Path(given.data), name={name!r}, shards=2)
"""


def test_two_processes_demonstrate_and_fine_tune_as_one(inputs, tmp_path):
    run = SIZES | KEPT | {
        "objective.kind": "sft", "objective.rl": "none", "objective.beta_d": ((0, 0.0),), "host_devices": 4, "steps": 2,
        "evaluate_batch": 4,
    }  # fmt: skip
    states, clips = [], []
    for count in (1, 2):
        changes, folder = run | {"train_set": f"shown_{count}"}, tmp_path / str(count)
        before = DEMONSTRATE.format(changes=changes, name=changes["train_set"])
        codes, said = jobs.finish(jobs.start(inputs, folder, *[changes] * count, before=before))
        assert codes == [0] * count, said
        states += final_states(small_config(inputs, **changes), folder)
        reader = RecordReader(inputs / "data", changes["train_set"], clips=True)
        clips.append(np.stack([record.clip["video"] for record in reader]))
    np.testing.assert_allclose(*clips, atol=1e-4)
    assert len(clips[0]) == len(RecordReader(inputs / "data", "train"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *(state.lora for state, _ in states))


def test_each_process_reads_the_tasks_of_its_own_rollouts(inputs, two):
    config = small_config(inputs, **RUN)
    count, reader = config.rollout.tasks, RecordReader(config.data, "train")
    order = task_batches(reader, tasks_per_step=count, seed=config.seed, lengths={"text": config.text_length})
    ids = [order.take().ids for _ in range(STEPS)]
    size = {record.id: len(record.to_bytes()) for record in reader}
    for text, own in zip(two[1], (slice(count // 2), slice(count // 2, None)), strict=True):
        read = [int(found) for found in re.findall(r"read train (\d+)", text)]
        assert read == [size[name] for step in ids for name in step[own]]
        assert len(re.findall(r"read validation", text)) == 2 * (STEPS // 2)  # of four clips, at every evaluation


@pytest.mark.parametrize("rows, ways", [(8, 4), (8, 8), (4, 8)])
def test_rows_are_placed_from_the_part_that_a_process_has(rows, ways):
    mesh = make_mesh(fsdp=ways, devices=jax.devices()[:ways])
    sharding = rows_or_whole(mesh, rows)
    np.testing.assert_array_equal(hosts.rows_held(rows, sharding), np.arange(rows))
    x = np.arange(12.0).reshape(4, 3)
    at = np.repeat(np.arange(4), rows // 4)[::-1]
    placed = hosts.place_rows(x, at, sharding)
    assert placed.sharding == sharding
    np.testing.assert_array_equal(placed, x[at])


def test_another_config_on_one_of_them_stops_all_before_anything_is_trained(inputs, tmp_path):
    codes, said = jobs.finish(jobs.start(inputs, tmp_path, RUN, RUN | {"steps": 3}))
    assert all(codes) and all("process 1 has another config than process 0" in text for text in said), said


def test_a_job_goes_on_as_if_none_had_been_killed_or_told_to_stop(inputs, two, tmp_path):
    rng, faults, wanted = random.Random(0), 0, max(KILLS // 3, 2)
    unwatched = RUN | {"evaluate_every": 0, "held_out.factory": ""}  # compiles less
    while faults < wanted:
        workdir, codes = tmp_path / f"run {faults}", []
        while faults < wanted and codes != [0, 0]:
            job = jobs.start(inputs, workdir, unwatched, unwatched)
            done, kill = jobs.logged(workdir), (1 - faults % 2)
            jobs.wait_for(lambda w=workdir, n=done: jobs.logged(w) > n, job)
            time.sleep(rng.uniform(0, 0.5) if faults > 1 else 0)
            victim = rng.randrange(2) if faults > 1 else 1
            job[victim].send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            began = time.monotonic()
            codes, said = jobs.finish(job)
            if codes == [0, 0]:
                continue
            if kill:
                assert time.monotonic() - began < 40 and codes[victim] == -signal.SIGKILL, said
                if victim == 1:
                    assert codes[0] == hosts.LOST and "process 1 of this job has died or hangs" in said[0], said
                else:  # JAX ends the others itself
                    assert codes[1] not in (0, 75) and "most likely indicates that another task died" in said[1], said
            else:
                assert codes == [75, 75], said
                steps = [re.search(r"told to stop: saved after step (\d+)", text)[1] for text in said]
                assert steps[0] == steps[1] and (workdir / "checkpoints" / steps[0]).is_dir()
            faults += 1
        newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
        assert newest == STEPS or codes != [0, 0]
        undisturbed = tmp_path / f"undisturbed {faults}"
        for step in range(1, newest + 1):
            shutil.copytree(two[0] / "checkpoints" / str(step), undisturbed / "checkpoints" / str(step))
        assert_same(*final_states(small_config(inputs, **RUN), undisturbed, workdir))

"""Jobs of several processes: what they agree on, and that they train as one process does."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
from small import VARIANTS, make_inputs, small_config
from test_train import final_states

from world_distill import hosts, train
from world_distill.config import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
# See test_train: entries of vanishing gradient, and rows on either side of a clip, would follow the rounding of sums.
SMOOTH = {"optimizer.eps": 1e-3, "objective.awm_temperature": 1.0, "host_devices": 4, "steps": 2}
RUN = VARIANTS["awm"] | SMOOTH | {"rollout.staleness": 1, "evaluate_every": 2}


def test_variables_come_together():
    with pytest.raises(UserError, match="not JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        hosts.start({"JAX_COORDINATOR_ADDRESS": "localhost:1"})
    with pytest.raises(UserError, match="JAX_PROCESS_ID = 2 of JAX_NUM_PROCESSES = 2"):
        hosts.start(dict(zip(hosts.VARIABLES, ("localhost:1", "2", "2"), strict=True)))
    hosts.start(dict(zip(hosts.VARIABLES, ("localhost:1", "1", "0"), strict=True)))  # alone: nothing to join
    assert hosts.is_main() and not jax.distributed.is_initialized()


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


CODE = """
    import pathlib, sys
    sys.path[:0] = [{tests!r}, {root!r}]
    from small import small_config
    from world_distill import train
    inputs, workdir = map(pathlib.Path, sys.argv[1:3])
    overrides = {overrides!r}
    train.train(small_config(inputs, **overrides), workdir)
"""


def start_jobs(inputs, workdir, *overrides):
    """A process for each set of overrides, on 2 CPU devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    jobs = []
    for index, given in enumerate(overrides):
        code = textwrap.dedent(CODE).format(tests=str(ROOT / "tests"), root=str(ROOT), overrides=given)
        flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
        values = (f"localhost:{port}", str(len(overrides)), str(index))
        environment = os.environ | dict(zip(hosts.VARIABLES, values, strict=True)) | {"XLA_FLAGS": flags}
        command = [sys.executable, "-c", code, str(inputs), str(workdir)]
        jobs.append(
            subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    return jobs


def finish(jobs, timeout=240):
    try:
        said = [job.communicate(timeout=timeout) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [job.returncode for job in jobs], ["".join(texts) for texts in said]


def test_two_processes_train_as_one(tmp_path):
    make_inputs(tmp_path)
    config = small_config(tmp_path, **RUN)
    train.train(config, tmp_path / "one")
    codes, said = finish(start_jobs(tmp_path, tmp_path / "two", RUN, RUN))
    assert codes == [0, 0], said
    (one, data), (two, other) = final_states(config, tmp_path / "one", tmp_path / "two")
    assert data == other
    for a, b in zip(jax.tree.leaves(one.lora), jax.tree.leaves(two.lora), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for a, b in zip(*lines, strict=True):  # judged in two places, each clip once
        assert a.keys() == b.keys()
        np.testing.assert_allclose(a.get("reward/total", 0), b.get("reward/total", 0), atol=1e-4)
    assert len(list((tmp_path / "two").glob("judgments-*.sqlite"))) == 2
    assert "step 2/2" in said[0] and "step 2/2" not in said[1]

    # Another config on one of them stops both, before anything is trained.
    codes, said = finish(start_jobs(tmp_path, tmp_path / "other", RUN, RUN | {"steps": 3}))
    assert all(codes) and all("process 1 has another config than process 0" in text for text in said), said


def test_all_processes_save_after_the_same_step_when_one_is_told_to_stop(tmp_path):
    make_inputs(tmp_path)
    run = RUN | {"steps": 1000, "evaluate_every": 0}
    jobs = start_jobs(tmp_path, tmp_path / "run", run, run)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    jobs[1].send_signal(signal.SIGTERM)
    codes, said = finish(jobs)
    steps = [re.search(r"told to stop: saved after step (\d+)", text)[1] for text in said]
    assert all(codes) and steps[0] == steps[1], said
    assert (tmp_path / "run" / "checkpoints" / steps[0]).is_dir()

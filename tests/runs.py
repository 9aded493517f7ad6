"""Runs held against each other: every array of their checkpoints, and what lasts of their logs."""

import shutil

import jax
import numpy as np

from world_distill import build
from world_distill.storage.checkpoints import Checkpointer
from world_distill.training.step_programs import make_programs


def final_states(config, *workdirs):
    """Every array of each folder's newest checkpoint, on the host, and the state of its data."""
    mesh = build.start_devices(config)
    found = []
    for workdir in workdirs:
        with Checkpointer(workdir / "checkpoints") as checkpointer:
            state, iterator, _ = checkpointer.restore_latest(make_programs(config, mesh).state)
        found.append((jax.device_get(state.replace(key=jax.random.key_data(state.key))), iterator))
    return found


def lasting(line):
    """A line of a log without what depends on the machine and the hour."""
    return {k: v for k, v in line.items() if not k.startswith(("time/", "speed/"))}


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a[0], b[0])
    assert a[1] == b[1]


def after_two_steps(folder, to):
    """A copy of a run, as if it had been killed in the third step. Its judge will be asked again."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("judgments*", "4", "6"))
    return to

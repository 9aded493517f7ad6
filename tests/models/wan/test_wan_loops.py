"""Sampling with the transformer against diffusers' image-to-video pipeline, from a golden of `make_goldens.py`."""

import pathlib

import numpy as np
import pytest

from tests.models.wan.wan_loops import CASES, compare, compare_demonstrator
from world_distill.core import flow, unipc

GOLDENS = pathlib.Path(__file__).parent / "goldens"


@pytest.fixture(scope="module")
def arrays():
    with np.load(GOLDENS / "samplers.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def theirs():
    with np.load(GOLDENS / "transformer_3x4x6.npz") as file:
        return {key[2:]: file[key] for key in file if key.startswith("w:")}


@pytest.mark.parametrize("solver, scale", CASES)
def test_clips_are_those_of_diffusers(arrays, theirs, solver, scale):
    compare(solver, scale, 0, arrays, theirs)


def test_the_guided_demonstrator_is_that_of_diffusers(arrays, theirs):
    compare_demonstrator(0, arrays, theirs)


def test_schedules_are_those_of_diffusers(arrays):
    names = [key.split(":")[0] for key in arrays if key.endswith(":sigmas")]
    assert len(names) == 12
    for name in names:
        solver, steps, shift = name.split("_")
        if solver == "unipc":
            times, told, *_ = unipc.unipc_schedule(int(steps), float(shift))
        else:
            times = flow.sampling_times(int(steps), float(shift))
            told = times[:-1]
        np.testing.assert_allclose(times, arrays[f"{name}:sigmas"], atol=2e-7)
        # The network multiplies by 1000: what it reads is the timestep, up to one rounding.
        np.testing.assert_allclose(1000 * told, arrays[f"{name}:timesteps"], rtol=3e-7)


def test_wan_is_told_whole_timesteps():
    told = 1000 * unipc.unipc_schedule(8, 5.0).times_told.astype(np.float64)
    np.testing.assert_allclose(told, [999, 972, 937, 893, 833, 750, 625, 418], rtol=1e-7)

"""Rotary tables of the full size (121 frames of 704x1280) against diffusers'."""

import numpy as np
import pytest

from tests.models.wan.small_wan import GOLDENS
from world_distill.models.layers import rope_tables
from world_distill.models.wan.modeling import WanConfig

GRID = (31, 22, 40)


@pytest.fixture(scope="module")
def tables():
    return rope_tables(GRID, WanConfig().rope_dims, theta=WanConfig().theta)


def test_sampled_rows_are_those_of_diffusers(tables):
    with np.load(GOLDENS / "rope_31x22x40.npz") as golden:
        for ours, name in zip(tables, ("cos", "sin"), strict=True):
            assert ours.shape == (31 * 22 * 40, 64)
            np.testing.assert_allclose(ours[golden["row"]], golden[name], rtol=0, atol=1e-6)


@pytest.mark.torch
def test_all_rows_are_those_of_diffusers(tables):
    pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
    from tests.models.wan.make_goldens import rope

    live = rope(GRID, rows=31 * 22 * 40, seed=0)
    for ours, name in zip(tables, ("cos", "sin"), strict=True):
        np.testing.assert_allclose(ours, live[name], rtol=0, atol=1e-6)

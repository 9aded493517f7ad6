"""Rotary tables of the full size (121 frames of 704x1280) against diffusers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.wan.small_wan import GOLDENS
from world_distill.models.layers import apply_rope, rope_tables
from world_distill.models.rope import rope_waves, rotate
from world_distill.models.wan.modeling import WanConfig

GRID = (31, 22, 40)


@pytest.fixture(scope="module")
def tables():
    """Of pairs of dimensions: each wave stands there twice."""
    waves = [np.asarray(y) for y in rope_waves(GRID, WanConfig().rope_dims, theta=WanConfig().theta)]
    for y in waves:
        np.testing.assert_array_equal(y[:, 0::2], y[:, 1::2])
    return [y[:, 0::2] for y in waves]


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


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_heads_are_turned_as_by_pairs_with_the_same_gradient(dtype, platform):
    """Exactly: what the product with 0, 1 and -1 does to bfloat16 is no rounding."""
    grid, dims = (3, 2, 2), (4, 2, 2)
    x = jax.random.normal(jax.random.key(0), (2, 12, 3, 8)).astype(dtype)
    tables, waves = rope_tables(grid, dims, theta=10.0), rope_waves(grid, dims, theta=10.0)
    expected, back = jax.vjp(lambda x: apply_rope(x.astype(jnp.float32), *tables).astype(dtype), x)
    found, pull = jax.vjp(lambda x: rotate(x, *waves, platform), x)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=1e-6)
    rounding = 1e-6 if dtype == jnp.float32 else 0.02
    for a, b in zip(pull(found), back(found), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=rounding)

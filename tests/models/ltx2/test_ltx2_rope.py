"""Rotary tables of the full size (121 frames of 512x768, 126 moments of sound) against diffusers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.ltx2.small_ltx2 import GOLDENS
from world_distill.models.ltx2.config import LTX2Config
from world_distill.models.ltx2.rope import audio_positions, rotate_halves, rotation, split_rope, video_positions

GRID, MOMENTS = (16, 16, 24), 126


@pytest.fixture(scope="module")
def tables():
    config = LTX2Config()
    seen = video_positions(GRID, config.fps, config.stride)
    heard = (audio_positions(MOMENTS, config.audio_stride, config.audio_hop, config.audio_rate),)

    @jax.jit
    def make():
        return {
            name: split_rope(
                positions, config.ranges[: len(positions)], width=width, heads=config.heads, theta=config.theta,
                repeats=repeats,
            )
            for name, positions, width, repeats in (
                ("video", seen, config.width, 1),
                ("audio", heard, config.audio_width, 1),
                ("video_time", seen[:1], config.audio_width, GRID[1] * GRID[2]),
                ("audio_time", heard, config.audio_width, 1),
            )
        }  # fmt: skip

    return make()


def compare(tables, golden):
    for name, ours in tables.items():
        for table, key in zip(ours, ("cos", "sin"), strict=True):
            found = np.asarray(table)[golden[f"{name}:row"]]
            np.testing.assert_allclose(found, golden[f"{name}:{key}"], rtol=0, atol=1e-6, err_msg=f"{name} {key}")


def test_sampled_rows_are_those_of_diffusers(tables):
    assert tables["video"][0].shape == (16 * 16 * 24, 32, 64) and tables["audio"][0].shape == (MOMENTS, 32, 32)
    with np.load(GOLDENS / "rope.npz") as golden:
        compare(tables, golden)


@pytest.mark.torch
def test_all_rows_are_those_of_diffusers(tables):
    pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
    from tests.models.ltx2.make_goldens import rope

    compare(tables, rope())


def test_a_program_holds_tables_of_axes_and_none_of_tokens():
    positions = video_positions(GRID, 24.0, (8, 32, 32))
    traced = jax.jit(lambda: split_rope(positions, (20, 2048, 2048), width=4096, heads=32, theta=1e4)).trace()
    assert sum(np.size(x) for x in traced.jaxpr.consts) <= 2 * 56 * 2048


def test_halves_turn_by_the_angle_and_the_fill_is_empty():
    cos, sin = split_rope([np.float32([0.0, 0.7])], [1], width=8, heads=2, theta=3.0, length=3)
    np.testing.assert_array_equal(cos[2], 0)
    x = jax.random.normal(jax.random.key(0), (2, 2, 2, 4)).astype(jnp.bfloat16)
    y = rotate_halves(x, cos[:2], sin[:2])
    assert y.dtype == jnp.bfloat16
    angle = np.arctan2(sin[:2], cos[:2])  # [n h 2]
    plane = np.asarray(x, np.float32)[..., :2] + 1j * np.asarray(x, np.float32)[..., 2:]
    turned = plane * np.exp(1j * angle)
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], -1), atol=0.02)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_form_for_tpus_gives_the_same(dtype):
    cos, sin = split_rope([np.float32([0.0, 0.7, 0.9])], [1], width=16, heads=2, theta=3.0)
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 8)).astype(dtype)
    found, expected = (rotation(cos, sin, platform)(x) for platform in ("tpu", "cpu"))
    assert found.dtype == dtype
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (found, expected)), rtol=1e-6, atol=1e-6)
    assert np.abs(np.asarray(found - x, np.float32)).max() > 0.1

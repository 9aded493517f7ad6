"""Tiles put together: exactly where a tile knows all that it needs, and nearly so in the decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from world_distill.models.autoencoders import random_weights
from world_distill.models.ltx2 import tiles, vae
from world_distill.models.ltx2.codec import LTX2Codec
from world_distill.models.ltx2.vae_tensors import vae_entries
from world_distill.models.tensor_map import our_shapes

LATENTS, PIXELS = (1, 1, 1), (4, 6, 5)


def unfold(z):
    """A decoder that looks at one latent at a time: 1 + 4k frames, each pixel from its own latent."""
    x = jnp.repeat(jnp.repeat(jnp.repeat(z, 4, 1), 6, 2), 5, 3)[:, 3:]
    f, h, w = x.shape[1:4]
    return x + jnp.arange(f)[:, None, None, None] % 4 + jnp.arange(h)[:, None, None] % 6 + jnp.arange(w)[:, None] % 5


def fold(x):
    """An encoder of its kind: the last frame and the first pixel of each latent's."""
    return x[:, ::4, ::6, ::5]


@pytest.mark.parametrize(
    ("grid", "tile", "overlap"),
    [
        ((9, 3, 4), (6, 3, 4), (3, 1, 1)),
        ((3, 9, 10), (3, 6, 6), (1, 3, 2)),
        ((11, 5, 7), (5, 4, 4), (2, 2, 1)),  # three tiles in time, unevenly spread
    ],
)
def test_tiles_of_what_looks_at_one_latent_make_the_whole(grid, tile, overlap):
    z = np.random.default_rng(0).normal(size=(2, *grid, 4)).astype(np.float32)
    whole = unfold(z)
    found = jax.jit(lambda z: tiles.in_tiles(unfold, z, grid, tile, overlap, scale=LATENTS, scale_after=PIXELS))(z)
    np.testing.assert_allclose(found, whole, atol=1e-5)
    back = jax.jit(lambda x: tiles.in_tiles(fold, x, grid, tile, overlap, scale=PIXELS, scale_after=LATENTS))(whole)
    np.testing.assert_allclose(back, fold(whole), atol=1e-5)


def test_tiles_are_of_the_size_that_fits():
    fits = lambda places: lambda tile: np.prod(tile) <= places  # noqa: E731
    assert tiles.tile_shape((16, 16, 24), fits(6144), (6, 6, 6)) == (16, 16, 24)
    # Twice as wide: two tiles, that share 6 columns of 48 (27 + 27 - 6), and then one cut in time or height, too.
    assert tiles.tile_shape((16, 16, 48), fits(16 * 16 * 27), (6, 6, 6)) == (16, 16, 27)
    assert tiles.tile_shape((48, 16, 16), fits(16 * 16 * 27), (6, 6, 6)) == (27, 16, 16)
    assert tiles.tile_shape((16, 16, 48), fits(16 * 16 * 20), (6, 6, 6)) == (16, 16, 20)
    with pytest.raises(ValueError, match="do not fit into memory"):
        tiles.tile_shape((16, 16, 48), fits(100), (6, 6, 6))


def test_shares_grow_in_a_straight_line_from_a_margin_on():
    first, second = tiles._windows(np.array([0, 10]), size=18, margin=2)
    np.testing.assert_allclose(first, [1] * 12 + [0.8, 0.6, 0.4, 0.2, 0, 0])
    np.testing.assert_allclose(second, [0, 0, 0.2, 0.4, 0.6, 0.8] + [1] * 12)


def seam(overlap):
    """Worst line's error across a seam in time and one in width, in deviations of the clip (root mean square)."""
    config = vae.VaeConfig(
        channels=4, encoder_widths=(8, 8, 16, 16), decoder_widths=(8, 16, 32), decoder_blocks=(5, 5, 5, 5)
    )
    weights = random_weights(jax.random.key(0), our_shapes(vae_entries(config)), jnp.float32)
    # Branches of .3: in trained networks, too, a block changes a small part of what it is given.
    weights["decoder"] = jax.tree_util.tree_map_with_path(
        lambda path, x: 0.3 * x if any(key.key == "conv2" for key in path) else x, weights["decoder"]
    )
    grid = (10, 2, 10)
    tile = ((10 + overlap + 1) // 2, 2, (10 + overlap + 1) // 2)
    z = np.random.default_rng(0).normal(size=(1, *grid, 4)).astype(np.float32)
    decode = lambda z: vae.decode(weights, z, config)  # noqa: E731
    whole = jax.jit(decode)(z)
    scales = {"scale": LATENTS, "scale_after": (8, 32, 32)}
    found = jax.jit(lambda z: tiles.in_tiles(decode, z, grid, tile, (overlap, 1, overlap), **scales))(z)
    squares = np.square(found - whole) / np.var(whole)
    return np.sqrt([squares.mean((0, 2, 3, 4)).max(), squares.mean((0, 1, 2, 4)).max()])


def test_seams_of_the_decoder_are_as_faint_as_the_codec_says():
    found = seam(LTX2Codec(vae.VaeConfig()).overlap[0])
    assert (0.1 < found).all() and (found < 0.135).all()  # 13 % at most, and no less than can be

"""The codec: bytes, rows, tiles and devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.ltx2.small_vae import CONFIG, case, golden
from world_distill.devices.sharding import make_mesh, tree_shardings
from world_distill.models.ltx2 import vae
from world_distill.models.ltx2.codec import PLACES, LTX2Codec

CODEC = LTX2Codec(CONFIG, jnp.dtype("float32"))


@pytest.fixture(scope="module")
def kept():
    return golden()


def test_bytes_are_those_of_diffusers_clips(kept):
    found = np.asarray(jax.jit(CODEC.decode)({"vae": kept.weights}, {"video": kept.latents}))
    assert found.dtype == np.uint8 and found.shape == (1, 9, 64, 96, 3)
    expected = np.clip(np.asarray(kept.clips, np.float64) / 2 + 0.5, 0, 1) * 255
    assert np.abs(found[:, :, ::7, ::5] - expected).max() < 0.51 and np.ptp(expected) == 255


def test_bytes_are_encoded_as_values_from_minus_1_to_1(kept):
    found = jax.jit(CODEC.encode)({"vae": kept.weights}, kept.pixels)["video"]
    np.testing.assert_allclose(found, kept.encoded, atol=5e-5)
    scene = jax.jit(CODEC.encode)({"vae": kept.weights}, kept.pixels[:, :1])["video"]
    np.testing.assert_allclose(scene, kept.encoded[:, :1], atol=5e-5)


def test_rows_keep_their_order_some_at_a_time(kept):
    base = {"vae": kept.weights}
    latents = np.random.default_rng(0).normal(size=(4, 1, 2, 2, 4)).astype(np.float32)
    rows = np.concatenate([jax.jit(CODEC.decode)(base, {"video": row[None]}) for row in latents])
    assert len({row.tobytes() for row in rows}) == 4
    some = dataclasses.replace(CODEC, rows=2)
    clips = np.asarray(jax.jit(some.decode)(base, {"video": latents}))
    assert np.abs(clips.astype(int) - rows).max() <= 1  # a sum in another order may round to the next byte
    again = jax.jit(some.encode)(base, clips)["video"]
    np.testing.assert_allclose(again, jax.jit(CODEC.encode)(base, clips)["video"], atol=2e-5)


def test_eight_devices_make_what_one_makes(kept):
    mesh = make_mesh(data=2, fsdp=2, context=1, tensor=2)
    spread = dataclasses.replace(CODEC, mesh=mesh)
    shapes = jax.eval_shape(spread.init, jax.random.key(0))
    shardings = tree_shardings(mesh, spread.axes(), shapes)
    assert not shardings["decoder"]["up_0"]["step"]["kernel"].is_fully_replicated
    base = {"vae": jax.device_put(kept.weights, shardings)}
    latents = {"video": np.random.default_rng(1).normal(size=(4, 2, 2, 4, 4)).astype(np.float32)}
    decode = jax.jit(spread.decode)
    alone = np.asarray(jax.jit(CODEC.decode)({"vae": kept.weights}, latents))
    assert np.abs(np.asarray(decode(base, latents)).astype(int) - alone).max() <= 1
    # A clip's parts stay where they are: what is gathered are weights, and neighbours send their borders.
    assert "collective-permute" in decode.lower(base, latents).compile().as_text()
    encoded = jax.jit(spread.encode)(base, alone)["video"]
    np.testing.assert_allclose(encoded, jax.jit(CODEC.encode)({"vae": kept.weights}, alone)["video"], atol=2e-5)


def test_the_papers_clip_is_decoded_as_a_whole_on_one_device():
    full = LTX2Codec(vae.VaeConfig())
    grid = (16, 16, 24)  # 121 frames at 512x768
    assert PLACES == np.prod(grid) and full._fits(grid) and not full._fits((17, 16, 24))
    # Four devices that share a clip take four times as much, where its width divides.
    shared = dataclasses.replace(full, mesh=make_mesh(fsdp=2, tensor=4))
    assert shared._fits((32, 16, 48)) and not shared._fits((32, 16, 49))


@pytest.mark.parametrize("devices", [1, 8])
def test_larger_clips_are_cut_into_tiles(kept, devices):
    """Two tiles of 4 columns that share 2: each alone away from the other, and a mixture between."""
    mesh = make_mesh(fsdp=4, tensor=2) if devices > 1 else None
    tiled = dataclasses.replace(CODEC, places=20 // (2 if mesh else 1), overlap=(1, 1, 2), mesh=mesh)
    base, z = {"vae": kept.weights}, np.random.default_rng(2).normal(size=(1, 2, 2, 6, 4)).astype(np.float32)
    decode, encode = (jax.jit(f) for f in (CODEC.decode, CODEC.encode))

    found = np.asarray(jax.jit(tiled.decode)(base, {"video": z})).astype(int)
    left, right = (np.asarray(decode(base, {"video": part})).astype(int) for part in (z[..., :4, :], z[..., 2:, :]))
    # The overlap is that of columns 64 to 127; a quarter of it on either side belongs to one tile alone.
    assert found.shape == (1, 9, 64, 192, 3)
    assert np.abs(found[..., :80, :] - left[..., :80, :]).max() <= 1
    assert np.abs(found[..., 112:, :] - right[..., 48:, :]).max() <= 1
    assert np.abs(left[..., 80:112, :] - right[..., 16:48, :]).max() > 50

    clip = found.astype(np.uint8)
    found = jax.jit(tiled.encode)(base, clip)["video"]
    left, right = (encode(base, part)["video"] for part in (clip[..., :128, :], clip[..., 64:, :]))
    expected = jnp.concatenate(
        [
            left[..., :2, :],
            (2 * left[..., 2:3, :] + right[..., :1, :]) / 3,
            (left[..., 3:, :] + 2 * right[..., 1:2, :]) / 3,
            right[..., 2:, :],
        ],
        axis=-2,
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_fresh_weights_decode_to_a_picture():
    weights = jax.jit(CODEC.init)(jax.random.key(0))
    assert not np.any(weights["mean"]) and np.all(weights["std"] == 1)
    latents = np.random.default_rng(3).normal(size=(1, 1, 2, 2, 4)).astype(np.float32)
    clip = jax.jit(vae.decode, static_argnums=2)(weights, latents, CONFIG)
    assert 0.1 < float(jnp.std(clip)) < 10  # stacked layers have unit gain as single ones do


@pytest.mark.torch
def test_bytes_are_those_of_the_pipeline():
    pytest.importorskip("torch", reason="torch is in the extra `torch`")
    pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
    import torch
    from diffusers.video_processor import VideoProcessor

    from tests.models.ltx2 import make_vae_goldens

    arrays = make_vae_goldens.vae(47, (9, 64, 64), rows=2)
    live = case(arrays)
    found = np.asarray(jax.jit(CODEC.decode)({"vae": live.weights}, {"video": live.latents}))
    theirs = VideoProcessor(vae_scale_factor=32).postprocess_video(torch.from_numpy(arrays["y"]), output_type="np")
    assert np.abs(found - 255.0 * theirs).max() < 0.51

"""The video autoencoder against diffusers: by a golden, and with diffusers at work beside us."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.ltx2.small_vae import CONFIG, case, golden
from world_distill.devices.sharding import make_mesh
from world_distill.models.ltx2 import vae

encode, decode = (jax.jit(f, static_argnames=("config", "mesh")) for f in (vae.encode, vae.decode))


def values(pixels):
    return pixels.astype(jnp.float32) / 127.5 - 1


@pytest.fixture(scope="module")
def kept():
    return golden()


def test_latents_and_clips_are_those_of_the_golden(kept):
    found = encode(kept.weights, values(kept.pixels), config=CONFIG)
    np.testing.assert_allclose(found, kept.encoded, atol=5e-5)
    found = decode(kept.weights, kept.latents, config=CONFIG)
    assert found.shape == (1, 9, 64, 96, 3)
    np.testing.assert_allclose(found[:, :, ::7, ::5], kept.clips, atol=5e-5)


def test_the_first_latent_frame_is_that_of_the_image(kept):
    image, clip = (encode(kept.weights, values(x), config=CONFIG) for x in (kept.pixels[:, :1], kept.pixels))
    np.testing.assert_allclose(image, clip[:, :1], atol=1e-5)


def test_sizes_without_latents_are_refused(kept):
    x = values(kept.pixels)
    for wrong, why in ((x[:, :8], r"8 frames.*1 \+ a multiple of 8"), (x[:, :, :-2], "multiples of 32")):
        with pytest.raises(ValueError, match=why):
            vae.encode(kept.weights, wrong, CONFIG)
    for thin in (x[:, :, :32], x[..., :32, :]):  # the decoder mirrors a line that is not there
        with pytest.raises(ValueError, match="twice that at least"):
            vae.encode(kept.weights, thin, CONFIG)
    with pytest.raises(ValueError, match="latents of 2x1"):
        vae.decode(kept.weights, kept.latents[:, :, :, :1], CONFIG)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"steps": ("spatial", "diagonal", "temporal", "temporal")}, "'diagonal'"),
        ({"encoder_blocks": (1, 2, 1, 2)}, "each step has a width"),
        ({"decoder_widths": (8, 16, 16)}, "each must be twice the one before"),
        ({"steps": ("spatial", "temporal", "spatial", "spatiotemporal")}, "32 times smaller and 4 times shorter"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(change, why):
    with pytest.raises(ValueError, match=why):
        vae.VaeConfig(**({"decoder_widths": (8, 16, 32)} | change))


# Rows along data; columns along context and tensor; rows of a frame of one line each, which mirror a neighbour's.
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((2, 2, 2, 4), {"data": 2, "context": 2, "tensor": 2}),
        ((2, 1, 4, 3), {"fsdp": 2, "context": 2, "tensor": 2}),
        ((1, 2, 3, 8), {"fsdp": 2, "context": 1, "tensor": 4}),
    ],
)
def test_eight_devices_make_what_one_makes(kept, shape, sizes):
    b, f, h, w = shape
    mesh = make_mesh(**({"data": 1, "fsdp": 1} | sizes))
    latents = np.random.default_rng(f).normal(size=(*shape, 4)).astype(np.float32)
    pixels = np.random.default_rng(f).uniform(-1, 1, size=(b, 8 * f - 7, 32 * h, 32 * w, 3)).astype(np.float32)
    for run, x in ((decode, latents), (encode, pixels)):
        alone = run(kept.weights, x, config=CONFIG)
        np.testing.assert_allclose(run(kept.weights, x, config=CONFIG, mesh=mesh), alone, atol=2e-5)


# ---- diffusers at work


@pytest.mark.torch
@pytest.mark.parametrize(
    ("seed", "clip", "rows"), [(41, (17, 96, 64), 2), (43, (1, 64, 160), 1), (45, (25, 64, 64), 1)]
)
def test_latents_and_clips_are_those_of_diffusers(seed, clip, rows):
    pytest.importorskip("torch", reason="torch is in the extra `torch`")
    pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")
    from tests.models.ltx2 import make_vae_goldens

    live = case(make_vae_goldens.vae(seed, clip, rows))
    found = encode(live.weights, values(live.pixels), config=CONFIG)
    np.testing.assert_allclose(found, live.encoded, atol=5e-5)
    np.testing.assert_allclose(decode(live.weights, live.latents, config=CONFIG), live.clips, atol=5e-5)

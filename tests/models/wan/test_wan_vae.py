"""The autoencoders against diffusers, whole and in pieces."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from world_distill.models.tensor_map import assemble
from world_distill.models.wan import vae
from world_distill.models.wan.published import vae_entries

GOLDENS = pathlib.Path(__file__).parent / "goldens"
SMALL = {"encoder_width": 4, "blocks": 1}
CONFIGS = {
    "2.1": vae.VaeConfig(channels=4, decoder_width=4, patch=1, shortcuts=False, **SMALL),
    "2.2": vae.VaeConfig(channels=6, decoder_width=6, **SMALL),
}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    """(config, weights, clip, latents, decoded clip), channels last."""
    with np.load(GOLDENS / f"vae_{request.param}.npz") as file:
        arrays = dict(file)
    theirs = {key[2:]: arrays.pop(key).astype(np.float32) for key in list(arrays) if key.startswith("w:")}
    config = CONFIGS[request.param]
    weights = jax.tree.map(jnp.asarray, assemble(vae_entries(config), theirs))
    weights |= {"mean": jnp.zeros(config.channels), "std": jnp.ones(config.channels)}
    return config, weights, *(jnp.moveaxis(jnp.asarray(arrays[name]), 1, -1) for name in "xzy")


@pytest.mark.parametrize("piece", [0, 1, 2])
def test_latents_and_clips_are_those_of_diffusers(case, piece):
    config, weights, x, z, y = case
    encode, decode = (jax.jit(f, static_argnums=2, static_argnames="piece") for f in (vae.encode, vae.decode))
    np.testing.assert_allclose(encode(weights, x, config, piece=piece), z, atol=5e-5)
    np.testing.assert_allclose(decode(weights, z, config, piece=piece), y, atol=5e-5)


def test_the_first_latent_frame_is_that_of_the_image(case):
    config, weights, x, z, _ = case
    np.testing.assert_allclose(vae.encode(weights, x[:, :1], config), z[:, :1], atol=1e-5)


def test_sizes_without_latents_are_refused(case):
    config, weights, x, _, _ = case
    with pytest.raises(ValueError, match=r"8 frames.*1 \+ a multiple of 4"):
        vae.encode(weights, x[:, :8], config)
    with pytest.raises(ValueError, match="multiples of"):
        vae.encode(weights, x[:, :, :-2], config)

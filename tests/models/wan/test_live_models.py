"""Transformer and autoencoders with diffusers at work beside us: other weights, sizes and lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.wan.small_wan import CONFIG, inputs, network
from tests.models.wan.test_wan_vae import CONFIGS
from world_distill.models.tensor_map import assemble
from world_distill.models.wan import vae
from world_distill.models.wan.published import transformer_entries, vae_entries

pytestmark = pytest.mark.torch
pytest.importorskip("torch", reason="torch is in the extra `torch`")
pytest.importorskip("diffusers", reason="diffusers is in the extra `torch`")


def split(arrays):
    """Arrays without the weights, and the weights under diffusers' names."""
    theirs = {key[2:]: x.astype(np.float32) for key, x in arrays.items() if key.startswith("w:")}
    return {key: x for key, x in arrays.items() if not key.startswith("w:")}, theirs


@pytest.mark.parametrize(("seed", "grid", "tokens"), [(21, (1, 2, 2), 1), (22, (5, 2, 14), 512), (23, (3, 18, 2), 40)])
def test_velocities_are_those_of_diffusers(seed, grid, tokens):
    from tests.models.wan import make_goldens

    arrays, theirs = split(make_goldens.transformer(seed, grid, tokens))
    v = jax.jit(network(CONFIG))(assemble(transformer_entries(CONFIG), theirs), *inputs(arrays))
    np.testing.assert_allclose(v, np.moveaxis(arrays["v"], 1, -1), atol=5e-5)


@pytest.mark.parametrize(("version", "clip"), [("2.1", (1, 8, 40)), ("2.1", (5, 24, 8)), ("2.2", (5, 16, 80))])
def test_latents_and_clips_are_those_of_diffusers(version, clip):
    from tests.models.wan import make_goldens

    arrays, theirs = split(make_goldens.vae(version, 24, clip))
    config = CONFIGS[version]
    weights = jax.tree.map(jnp.asarray, assemble(vae_entries(config), theirs))
    weights |= {"mean": jnp.zeros(config.channels), "std": jnp.ones(config.channels)}
    x, z, y = (jnp.moveaxis(jnp.asarray(arrays[name]), 1, -1) for name in "xzy")
    encode, decode = (jax.jit(f, static_argnums=2, static_argnames="piece") for f in (vae.encode, vae.decode))
    np.testing.assert_allclose(encode(weights, x, config), z, atol=5e-5)
    np.testing.assert_allclose(decode(weights, z, config, piece=1), y, atol=5e-5)

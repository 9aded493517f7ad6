"""The family as the programs see it, held to diffusers' numbers by goldens of `make_goldens.py`, without torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streams

from tests.models.wan.small_wan import CONFIG, load, network, random_lora
from tests.models.wan.test_wan_vae import CONFIGS, GOLDENS
from world_distill.models.tensor_map import assemble
from world_distill.models.wan import vae
from world_distill.models.wan.codec import WanCodec
from world_distill.models.wan.family import WanFamily
from world_distill.models.wan.published import vae_entries

CODEC = CONFIGS["2.2"]
GOLDEN = "transformer_3x4x6.npz"


def family(frames, size, **changes):
    settings = {"fps": 8.0, "dtype": jnp.dtype("float32"), "text_encoder": "words"} | changes
    return WanFamily(CONFIG, WanCodec(CODEC), frames=frames, size=size, **settings)


@pytest.fixture(scope="module")
def told():
    """(base, x_t, t, condition, velocity of diffusers): x_t has nonsense where the scene belongs."""
    arrays, weights, _ = load(GOLDEN)
    x, v = (np.moveaxis(arrays[name], 1, -1) for name in ("x", "v"))
    text = jnp.asarray(arrays["text"])
    # Everything is attended to, also where the mask says that it is padding: so the model was trained.
    mask = jnp.zeros(text.shape[:2], bool)
    x_t = jnp.asarray(x).at[:, 0].set(1e3)
    return {"transformer": weights}, x_t, jnp.asarray(arrays["t"]), streams.told(text, mask, jnp.asarray(x[:, :1])), v


def test_velocities_are_those_of_diffusers(told):
    base, x_t, t, condition, v = told
    made = family(9, (64, 96))
    assert streams.shape_of(made) == x_t.shape[1:] and streams.counts_of(made).tolist() == [0, 1, 1]
    found = np.asarray(jax.jit(streams.velocity_of(made))(base, None, x_t, t, condition))
    np.testing.assert_allclose(found[:, 1:], v[:, 1:], atol=5e-5)
    assert not found[:, 0].any() and np.abs(v[:, 0]).max() > 0.1  # the network says something there, too


def test_an_executor_is_used_at_its_scale(told):
    base, x_t, t, condition, v = told
    lora = random_lora(base["transformer"], targets=r"blocks\.self_attention\.q|head")
    found = jax.jit(streams.velocity_of(family(9, (64, 96), lora_scale=0.4)))(base, lora, x_t, t, condition)
    times = np.concatenate([np.zeros((len(t), 1)), np.repeat(t[:, None], 2, axis=1)], axis=1)
    x = x_t.at[:, :1].set(condition.scene["video"])
    stronger = jax.tree_util.tree_map_with_path(lambda path, w: 0.4 * w if path[-1].key == "b" else w, lora)
    expected = jax.jit(network(CONFIG))(
        base["transformer"], x, jnp.float32(times), condition.text["text"].states, stronger
    )
    np.testing.assert_allclose(found[:, 1:], expected[:, 1:], atol=5e-5)
    assert np.abs(found - v)[:, 1:].max() > 0.1


@pytest.fixture(scope="module")
def codec():
    """(base, latents, what diffusers decodes them to)."""
    with np.load(GOLDENS / "vae_2.2.npz") as file:
        arrays = dict(file)
    theirs = {key[2:]: arrays[key].astype(np.float32) for key in arrays if key.startswith("w:")}
    weights = jax.tree.map(jnp.asarray, assemble(vae_entries(CODEC), theirs))
    weights |= {"mean": jnp.zeros(CODEC.channels), "std": jnp.ones(CODEC.channels)}
    return {"vae": weights}, *(jnp.moveaxis(jnp.asarray(arrays[name]), 1, -1) for name in "zy")


def test_bytes_are_those_of_diffusers_clips(codec):
    base, z, y = codec
    found = np.asarray(jax.jit(family(13, (32, 48)).codec.decode)(base, {"video": z}))
    assert found.dtype == np.uint8 and found.shape == y.shape
    expected = np.clip(np.asarray(y, np.float64) / 2 + 0.5, 0, 1) * 255
    assert np.abs(found - expected).max() < 0.51 and np.ptp(expected) > 100


def test_a_scene_is_encoded_as_values_from_minus_1_to_1(codec):
    base = codec[0]
    images = np.random.default_rng(0).integers(256, size=(2, 32, 48, 3), dtype=np.uint8)
    values = jnp.asarray(images.astype(np.float32) / 255 * 2 - 1)[:, None]
    found = family(13, (32, 48)).encoders.scene(base, images)["video"]
    np.testing.assert_allclose(found, vae.encode(base["vae"], values, CODEC), atol=1e-4)

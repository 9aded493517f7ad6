"""The transformer against diffusers, from goldens that `make_goldens.py` wrote."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.models.ltx2.small_ltx2 import CONFIG, OFF, inputs, load, network, random_lora, times, velocity, weights_of
from world_distill.devices.sharding import make_mesh, tree_shardings


@pytest.fixture(scope="module")
def golden():
    return load("transformer.npz")


def expected(arrays, config):
    return {"video": arrays["v_video"], "audio": arrays["v_audio"]} if config.joint else {"video": arrays["isolated"]}


def assert_same(found, wanted, atol=5e-5):
    assert found.keys() == wanted.keys()
    for name, v in found.items():
        np.testing.assert_allclose(v, wanted[name], atol=atol, err_msg=name)


@pytest.mark.parametrize("config", [CONFIG, OFF], ids=["joint", "off"])
def test_velocities_are_those_of_diffusers(golden, config):
    """Of two rows with other times and texts; the first frame and the first two moments are clean."""
    arrays, theirs = golden
    assert np.abs(arrays["v_video"] - arrays["isolated"]).max() > 0.1
    found = velocity(config, arrays, weights_of(config, theirs))
    assert all(v.dtype == jnp.float32 for v in found.values())
    assert_same(found, expected(arrays, config))


def test_without_audio_no_weight_of_it_exists(golden):
    made = flatten_dict(jax.eval_shape(network(OFF).init, jax.random.key(0)), sep=".")
    assert not [path for path in made if "audio" in path or "av_" in path]
    both = flatten_dict(jax.eval_shape(network(CONFIG).init, jax.random.key(0)), sep=".")
    assert made.keys() < both.keys()  # and its LoRA fits the whole network


@pytest.mark.parametrize("config", [CONFIG, OFF], ids=["joint", "off"])
def test_our_own_weights_have_the_mapped_shapes(golden, config):
    made = jax.eval_shape(network(config).init, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, made) == jax.tree.map(lambda x: x.shape, weights_of(config, golden[1]))


def test_one_time_is_that_of_all_places(golden):
    arrays, theirs = golden
    weights = weights_of(CONFIG, theirs)
    x, t, text = inputs(arrays)
    run = jax.jit(network(CONFIG))
    alike = {name: (0,) * len(places) for name, places in times(arrays).items()}
    one = run(weights, x, t[:, 1:], text)
    both = jax.jit(lambda *given: network(CONFIG)(weights, *given, times=alike))(x, t[:, ::-1], text)
    assert_same(both, one, atol=1e-5)
    with pytest.raises(ValueError, match="2 times"):
        network(CONFIG)(weights, x, t, text)


def test_a_row_depends_on_nothing_of_another(golden):
    arrays, theirs = golden
    weights = weights_of(CONFIG, theirs)
    given = inputs(arrays)
    alone = velocity(CONFIG, arrays, weights, given=jax.tree.map(lambda y: y[1:], given))
    assert_same(alone, {name: v[1:] for name, v in velocity(CONFIG, arrays, weights).items()}, atol=1e-5)


@pytest.fixture
def mesh():
    """30 tokens of video are filled up to 32 on it, 7 of audio to 8."""
    return make_mesh(fsdp=2, context=2, tensor=2)


def on(mesh, config, weights):
    """The config on the mesh, and the weights as they lie there."""
    placed = jax.device_put(weights, tree_shardings(mesh, network(config).axes(), weights))
    return dataclasses.replace(config, mesh=mesh), placed


def test_velocities_on_a_mesh_are_those_of_one_device(golden, mesh):
    arrays, theirs = golden
    weights = weights_of(CONFIG, theirs)
    lora = random_lora(weights, targets=r"blocks\..*\.(q|v|up)|.*\.(patch|head)")
    alone = velocity(CONFIG, arrays, weights, lora, 0.3)
    config, placed = on(mesh, CONFIG, weights)
    assert_same(velocity(config, arrays, placed, lora, 0.3), jax.device_get(alone), atol=2e-5)


def test_gradients_on_a_mesh_are_those_of_one_device(golden, mesh):
    arrays, theirs = golden
    weights = weights_of(OFF, theirs)
    lora = random_lora(weights, targets=r"blocks\..*\.(q|v|out|up|down)|video\.(patch|head)")

    def gradient(config, weights):
        def total(lora):
            v = network(config)(weights, *inputs(arrays, config), lora, 0.3, times(arrays))["video"]
            return (v * jnp.cos(v)).sum()

        return jax.jit(jax.grad(total))(lora)

    found, wanted = gradient(*on(mesh, OFF, weights)), gradient(OFF, weights)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        error, size = np.abs(ours - theirs).max(), np.abs(theirs).max()
        assert error <= 1e-4 * size, f"{jax.tree_util.keystr(path)}: off by {error} of {size}"


@pytest.mark.parametrize("config", [CONFIG, OFF], ids=["joint", "off"])
def test_bfloat16_weights_keep_a_bfloat16_stream_near_the_float32_result(golden, config):
    arrays, theirs = golden
    weights = weights_of(config, theirs)
    rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
    found = velocity(config, arrays, rounded)
    for name, v in velocity(config, arrays, weights).items():
        assert found[name].dtype == jnp.float32
        assert 1e-4 < np.linalg.norm(found[name] - v) / np.linalg.norm(v) < 0.05

"""Text connectors and what is stored for them, against diffusers, from goldens that `make_goldens.py` wrote."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.ltx2.small_ltx2 import CONNECTORS, connector_weights, connectors, load
from world_distill.devices.sharding import make_mesh, tree_shardings
from world_distill.models.ltx2.connectors import normalise_states, project_states


@pytest.fixture(scope="module")
def golden():
    arrays, theirs = load("connectors.npz")
    return arrays, *connector_weights(CONNECTORS, theirs)


def stored(arrays, kernel, length):
    """Rows as records hold them: real tokens first, zeros behind, in a batch of some length; and their mask."""
    rows = np.asarray(project_states(jnp.asarray(arrays["states"]), jnp.asarray(arrays["mask"]), jnp.asarray(kernel)))
    packed, mask = np.zeros((len(rows), length, rows.shape[-1]), np.float32), np.zeros((len(rows), length), bool)
    for i, own in enumerate(arrays["mask"]):
        packed[i, : own.sum()], mask[i, : own.sum()] = rows[i][own], True
    return packed, mask


def assert_same(found, arrays, rows=slice(None)):
    for name, states in found.items():
        np.testing.assert_allclose(states, arrays[name][rows], atol=5e-6, err_msg=name)


def test_states_are_those_of_diffusers(golden):
    """From texts of 12, 7 and 1 tokens, which diffusers pads on the left."""
    arrays, weights, kernel = golden
    found = jax.jit(connectors())(weights, *stored(arrays, kernel, CONNECTORS.length))
    assert found.keys() == {"video", "audio"}
    assert np.abs(arrays["video"] - arrays["audio"]).max() > 0.1
    assert_same(found, arrays)


def test_what_stands_behind_the_text_does_not_matter(golden):
    arrays, weights, kernel = golden
    rows, mask = stored(arrays, kernel, CONNECTORS.length)
    rows[~mask] = 9.0
    assert_same(jax.jit(connectors())(weights, rows, mask), arrays)


def test_short_batches_are_filled_up_and_long_ones_refused(golden):
    arrays, weights, kernel = golden
    rows, mask = (y[1:, :9] for y in stored(arrays, kernel, CONNECTORS.length))  # of 7 tokens and of 1
    assert_same(jax.jit(connectors())(weights, rows, mask), arrays, slice(1, None))
    with pytest.raises(ValueError, match="13 tokens.*at most 12"):
        connectors()(weights, *(jnp.asarray(y) for y in stored(arrays, kernel, CONNECTORS.length + 1)))


def test_without_audio_there_is_one_connector(golden):
    arrays, weights, kernel = golden
    config = dataclasses.replace(CONNECTORS, audio="off")
    assert jax.eval_shape(connectors(config).init, jax.random.key(0)).keys() == {"video"}
    found = jax.jit(connectors(config))({"video": weights["video"]}, *stored(arrays, kernel, CONNECTORS.length))
    assert found.keys() == {"video"}
    assert_same(found, arrays)


def test_our_own_weights_have_the_mapped_shapes(golden):
    made = jax.eval_shape(connectors().init, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, made) == jax.tree.map(lambda x: x.shape, golden[1])


def test_states_on_a_mesh_are_those_of_one_device(golden):
    """3 heads divide by no axis of the mesh."""
    arrays, weights, kernel = golden
    mesh = make_mesh(data=2, tensor=4)
    config = dataclasses.replace(CONNECTORS, mesh=mesh)
    placed = jax.device_put(weights, tree_shardings(mesh, connectors(config).axes(), weights))
    assert_same(jax.jit(connectors(config))(placed, *stored(arrays, kernel, CONNECTORS.length)), arrays)


def test_layers_have_a_mean_of_zero_and_a_range_of_eight_over_real_tokens(golden):
    arrays = golden[0]
    states, mask = arrays["states"], arrays["mask"]
    normal = np.asarray(normalise_states(jnp.asarray(states), jnp.asarray(mask))).reshape(states.shape)
    np.testing.assert_array_equal(normal[~mask], 0)
    for text, own in zip(normal, mask, strict=True):
        layers = np.moveaxis(text[own], -1, 0).reshape(states.shape[-1], -1)
        np.testing.assert_allclose(layers.mean(1), 0, atol=1e-5)
        np.testing.assert_allclose(layers.max(1) - layers.min(1), 8, atol=1e-4)

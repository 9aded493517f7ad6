"""The transformer against diffusers, from goldens that `make_goldens.py` wrote."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.wan.small_wan import CONFIG, inputs, load, network
from world_distill.models.blocks import StreamLayout
from world_distill.models.tensor_map import check_names
from world_distill.models.wan.published import transformer_entries


@pytest.mark.parametrize("name", ["transformer_3x4x6.npz", "transformer_2x10x4.npz"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_velocity_is_that_of_diffusers(name, remat):
    arrays, weights, _ = load(name)
    v = jax.jit(network(dataclasses.replace(CONFIG, remat=remat)))(weights, *inputs(arrays))
    np.testing.assert_allclose(v, np.moveaxis(arrays["v"], 1, -1), atol=5e-5)


@pytest.mark.parametrize("attention", ["blocked", "xla"])
def test_velocity_is_the_same_where_rows_stay_apart(attention, monkeypatch):
    arrays, weights, _ = load("transformer_3x4x6.npz")
    monkeypatch.setattr(StreamLayout, "rows", lambda _, x: x)  # as on accelerators
    v = network(dataclasses.replace(CONFIG, attention=attention))(weights, *inputs(arrays))
    np.testing.assert_allclose(v, np.moveaxis(arrays["v"], 1, -1), atol=5e-5)


def test_the_map_is_one_to_one():
    _, weights, theirs = load("transformer_3x4x6.npz")
    back = {}
    for entry in transformer_entries(CONFIG):
        node = weights
        for part in entry.path.split("."):
            node = node[part]
        back |= entry.scatter(node)
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(back[name], tensor)


def test_our_own_weights_have_the_mapped_shapes():
    made = jax.eval_shape(network(CONFIG).init, jax.random.key(0))
    _, weights, _ = load("transformer_3x4x6.npz")
    assert jax.tree.map(lambda x: x.shape, made) == jax.tree.map(lambda x: x.shape, weights)


def test_what_does_not_fit_is_listed():
    _, _, theirs = load("transformer_3x4x6.npz")
    shapes = {name: tensor.shape for name, tensor in theirs.items()}
    del shapes["proj_out.bias"]
    shapes["other"] = (1,)
    shapes["patch_embedding.weight"] = (32, 6, 1, 4, 4)
    assert check_names(transformer_entries(CONFIG), shapes) == [
        "missing: proj_out.bias [24]",
        "unexpected: other [1]",
        "shape: patch_embedding.weight is [32, 6, 1, 4, 4], expected [32, 6, 1, 2, 2]",
    ]


def test_sizes_that_cannot_be_cut_into_patches_are_refused():
    arrays, weights, _ = load("transformer_3x4x6.npz")
    x, times, text = inputs(arrays)
    with pytest.raises(ValueError, match="multiples of 2"):
        network(CONFIG)(weights, *map(jnp.asarray, (x[:, :, :3], times, text)))

"""Merged weights: every tensor as it was published, with what the Executor adds to it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.models.wan.small_wan import CONFIG, load, random_lora
from world_distill.models.wan.published import transformer_entries
from world_distill.weights.merged_model import _tensors

SCALE = 0.7
Q = "blocks.1.attn1.to_q.weight"


@pytest.fixture(scope="module")
def base():
    """(our weights, theirs by name)."""
    _, weights, theirs = load("transformer_3x4x6.npz")
    return jax.tree.map(jnp.asarray, weights), theirs


def merged(base, lora, dtype=np.float32):
    read = flatten_dict({"transformer": base[0]}, sep=".").__getitem__
    wanted = [(entry, np.dtype(dtype)) for entry in transformer_entries(CONFIG)]
    return dict(_tensors(wanted, read, lora, SCALE, "transformer"))


def test_an_adapted_layer_has_the_scaled_product_and_the_others_nothing(base):
    lora = jax.tree.map(jnp.asarray, random_lora(base[0], targets=r"blocks\.self_attention\.q"))
    found, factors = merged(base, lora), lora["blocks"]["self_attention"]["q"]
    assert found.keys() == base[1].keys()
    for name, tensor in found.items():
        if ".attn1.to_q.weight" in name:
            n = int(name.split(".")[1])
            change = (np.float64(factors["a"][n]) @ np.float64(factors["b"][n])).T  # theirs are [out in]
            np.testing.assert_allclose(tensor, base[1][name] + SCALE * change, atol=1e-5)
            assert np.abs(change).max() > 0.5
        else:
            np.testing.assert_array_equal(tensor, base[1][name])


def test_full_differences_are_added_as_they_are(base):
    differences = jax.tree.map(lambda x: jnp.full(x.shape, 0.5), base[0])
    for name, tensor in merged(base, {"full": differences}).items():
        np.testing.assert_allclose(tensor, base[1][name] + 0.5, atol=1e-6)


def test_the_sum_is_rounded_and_not_its_parts(base):
    lora = jax.tree.map(jnp.asarray, random_lora(base[0], targets=r"blocks\.self_attention\.q"))
    found = merged(base, lora, ml_dtypes.bfloat16)
    assert {x.dtype for x in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
    np.testing.assert_array_equal(found[Q], merged(base, lora)[Q].astype(ml_dtypes.bfloat16))

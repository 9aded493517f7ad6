"""Check sums against plain integers, whatever the type and the layout."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from world_distill.storage.check_sum import check_sum


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8, bool])
def test_the_sum_is_that_of_its_definition_on_any_layout(dtype):
    x = np.random.default_rng(0).integers(0, 2, (8, 3, 5)).astype(dtype)
    words = x.reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.itemsize])
    expected = sum((2 * i + 1) * int(word) for i, word in enumerate(words)) % 2**32
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("x")))
    assert int(check_sum(split)) == int(check_sum(jnp.asarray(x))) == expected


def test_every_flipped_bit_changes_it():
    x = np.random.default_rng(1).normal(size=(4, 7)).astype(np.float32)
    whole = int(check_sum(jnp.asarray(x)))
    for bit in range(32):
        flipped = x.copy()
        flipped.reshape(-1).view(np.uint32)[bit % 28] ^= np.uint32(1 << bit)
        assert int(check_sum(jnp.asarray(flipped))) != whole

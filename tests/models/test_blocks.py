"""What blocks share: every kind of rematerialisation computes the same, and tokens lie where the layout says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from world_distill import models
from world_distill.devices.sharding import make_mesh
from world_distill.models.blocks import StreamLayout, scan_blocks

DEPTH, WIDTH = 3, 8


def loss(weights, x, remat, unroll=1):
    def block(x, layer):
        return x + jnp.tanh(x @ layer["up"]) @ layer["down"]

    return jnp.sum(scan_blocks(block, x, weights, remat, unroll=unroll) ** 2)


def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    weights = {
        name: jax.random.normal(key, (DEPTH, WIDTH, WIDTH)) / 3 for name, key in zip(("up", "down"), keys, strict=False)
    }
    return weights, jax.random.normal(keys[2], (4, WIDTH))


def plain(weights, x):
    for i in range(DEPTH):
        x = x + jnp.tanh(x @ weights["up"][i]) @ weights["down"][i]
    return jnp.sum(x**2)


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
@pytest.mark.parametrize("unroll", [1, 3])
def test_blocks_follow_one_another_whatever_is_computed_again(remat, unroll):
    weights, x = inputs()
    value, gradient = jax.value_and_grad(loss)(weights, x, remat, unroll)
    expected, wanted = jax.value_and_grad(plain)(weights, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, wanted)


def products(jaxpr) -> int:
    """Matrix products in a traced program, a loop's body counted once."""
    inner = (p for equation in jaxpr.eqns for p in equation.params.values())
    subs = [sub for p in inner for sub in (p if isinstance(p, tuple) else (p,))]
    own = sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns)
    return own + sum(products(getattr(s, "jaxpr", s)) for s in subs if hasattr(getattr(s, "jaxpr", s), "eqns"))


def test_full_computes_products_again_and_dots_does_not():
    weights, x = inputs()
    counts = {
        remat: products(jax.make_jaxpr(jax.grad(lambda w, r=remat: loss(w, x, r)))(weights).jaxpr)
        for remat in ("none", "dots", "full")
    }
    assert counts["none"] == 6  # two forward, four backward
    assert counts["dots"] == 6 and counts["full"] > 6


@pytest.mark.parametrize("fill", ["lay", "gather", "scatter"])
def test_places_lie_along_context_and_tensor_but_within_attention(fill):
    mesh = make_mesh(fsdp=2, context=2, tensor=2)
    layout = StreamLayout(mesh)
    x = jnp.arange(2.0 * 3 * 8 * 4).reshape(2, 3, 8, 4)
    y = jax.jit(getattr(layout, fill))(x)
    np.testing.assert_array_equal(y, x)
    assert y.sharding.shard_shape(y.shape) == ((1, 3, 4, 4) if fill == "gather" else (1, 3, 2, 4))
    back = jax.jit(jax.grad(lambda x: jnp.sum(getattr(layout, fill)(x) ** 2)))(x)
    np.testing.assert_array_equal(back, 2 * x)


def test_places_are_filled_up_to_the_devices_that_share_them():
    layout = StreamLayout(make_mesh(fsdp=2, context=2, tensor=2))
    assert [layout.spare_places(places) for places in (8, 9, 11)] == [0, 3, 1]
    assert StreamLayout(None).spare_places(9) == 0


@pytest.mark.parametrize("family", ["tiny", "none"])
def test_a_family_without_published_code_is_not_compared(family):
    with pytest.raises(ValueError, match=f"'{family}' has no published code"):
        models.parity_of(family, {})

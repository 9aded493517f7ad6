"""What blocks share: every kind of rematerialisation computes the same, and tokens lie where the layout says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from world_distill import models
from world_distill.devices.sharding import make_mesh
from world_distill.models import blocks
from world_distill.models.blocks import StreamLayout, scan_blocks
from world_distill.models.layers import Linear
from world_distill.models.products import joint_product

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
def test_tokens_lie_along_context_and_tensor_but_within_attention(fill):
    mesh = make_mesh(fsdp=2, context=2, tensor=2)
    layout = StreamLayout(mesh)
    x = jnp.arange(2.0 * 8 * 4).reshape(2, 8, 4)
    y = jax.jit(getattr(layout, fill))(x)
    np.testing.assert_array_equal(y, x)
    assert y.sharding.shard_shape(y.shape) == ((1, 4, 4) if fill == "gather" else (1, 2, 4))
    back = jax.jit(jax.grad(lambda x: jnp.sum(getattr(layout, fill)(x) ** 2)))(x)
    np.testing.assert_array_equal(back, 2 * x)


def test_tokens_are_filled_up_to_the_devices_that_share_them():
    layout = StreamLayout(make_mesh(fsdp=2, context=2, tensor=2))
    assert [layout.length(tokens) for tokens in (8, 9, 11)] == [8, 12, 12]
    assert StreamLayout(None).length(9) == 9


def test_on_tpus_tokens_are_filled_up_to_tiles_of_the_kernel(monkeypatch):
    monkeypatch.setattr(blocks, "platform_of", lambda mesh: "tpu")
    layout = StreamLayout(make_mesh(fsdp=2, context=2, tensor=2))
    # Whole tiles of 1024; of 256; too short for tiles: 16 rows on each of 4 devices; too short for that, too.
    assert [layout.length(n) for n in (32760, 4900, 1560, 100)] == [32768, 5120, 1600, 100]
    assert StreamLayout(None).length(32760) == 32768


def layers(rngs):
    """Three layers, of which the last two are adapted, and their factors: one input of 12, LoRA of other ranks."""
    with nnx.use_eager_sharding(False):
        made = [Linear(12, 8, (None, "heads"), rngs=rngs) for _ in range(3)]
    draw = lambda *shape: jax.random.normal(rngs.params(), shape)  # noqa: E731
    for layer in made:
        layer.bias[...] = draw(8)
    return made, [None, *({"a": draw(12, rank), "b": draw(rank, 8)} for rank in (2, 3))]


@pytest.mark.parametrize("way", ["up", "down"])
def test_products_on_a_mesh_are_the_layers_own_with_the_same_gradients(way):
    """With LoRA's factors beside the weights, tokens gathered and sums scattered."""
    mesh = make_mesh(fsdp=2, context=2, tensor=2)
    made, factors = layers(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 8, 12))

    def run(layout, x, factors):
        if way == "up":
            found = layout.up(x, made, factors, 0.5)
        else:  # of heads: two axes are summed over
            found = [layout.down(x.reshape(2, 8, 4, 3), *pair, 0.5) for pair in zip(made, factors, strict=True)]
        return [y.reshape(2, 8, 8) for y in found]

    def loss(layout, x, factors):
        return sum(jnp.sum(jnp.sin(y) * (i + 1)) for i, y in enumerate(run(layout, x, factors)))

    plain, joint = StreamLayout(None), StreamLayout(mesh)
    assert plain._alone and not joint._alone
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run(joint, x, factors), run(plain, x, factors)
    )
    for given in (0, 1):  # x, then factors
        found, expected = (
            jax.jit(jax.grad(lambda *g, own=own: loss(own, *g), given))(x, factors) for own in (joint, plain)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_a_joint_product_has_the_gradient_of_both_and_makes_none_of_frozen_weights():
    shapes = (2, 5, 7), (4, 6), (3, 6)
    x, w, f = (jax.random.normal(key, n) for key, n in zip(jax.random.split(jax.random.key(0), 3), shapes, strict=True))

    def loss(product, x, w, f):
        return jnp.sum(jnp.sin(product(x, w, f)))

    plain = lambda x, w, f: x @ jnp.concatenate([w, f])  # noqa: E731
    for given in (0, 1, 2):
        found, expected = (jax.grad(functools.partial(loss, p), given)(x, w, f) for p in (joint_product, plain))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    frozen = jax.make_jaxpr(jax.grad(lambda f: loss(joint_product, x, w, f)))(f)
    assert products(frozen.jaxpr) <= 3  # forward, of x, of the factors


@pytest.mark.parametrize("family", ["tiny", "none"])
def test_a_family_without_published_code_is_not_compared(family):
    with pytest.raises(ValueError, match=f"'{family}' has no published code"):
        models.parity_of(family, {})
